"""Arrays of some other library, which has nothing but DLPack: with version 1 and before it."""


class Exporter:
    """An array of some other library: only `__dlpack__` and `__dlpack_device__`."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class OldExporter(Exporter):
    """The same of before version 1: without arguments."""

    def __dlpack__(self):
        return self.array.__dlpack__()
