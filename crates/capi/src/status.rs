//! How a call ends: status codes, the message of each thread's last failure, and the border that no panic crosses.
//!
//! Every entry of the library runs inside [`guard`]. What goes wrong inside is a [`Failure`]: a code and a sentence that
//! names the argument, what came and what was expected. The typed errors of the Rust crates become one here.

use core::cell::RefCell;
use core::ffi::{CStr, c_char};
use std::ffi::CString;
use std::panic::{AssertUnwindSafe, catch_unwind};

use qkv::cache::CacheError;
use qkv::gemm::GemmError;
use qkv::rotary::RotaryError;
use qkv::simd::IsaError;
use qkv::{AttentionError, TensorError};

/// How a call ended. Where it is not QKV_OK, nothing has been written to the outputs (but see QKV_ERROR_INTERNAL), and
/// qkv_last_error_message() says which argument was wrong, what came and what was expected.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum qkv_status {
    /// Done.
    QKV_OK = 0,
    /// A pointer is NULL that must not be.
    QKV_ERROR_NULL = 1,
    /// An address is not a multiple of its type's size.
    QKV_ERROR_MISALIGNED = 2,
    /// A number is not what it may be: a negative size, a NaN, an enumerator that there is not.
    QKV_ERROR_VALUE = 3,
    /// struct_size of a versioned struct is too small, or absurd.
    QKV_ERROR_STRUCT_SIZE = 4,
    /// Sizes do not fit each other, or a list has the wrong number of entries.
    QKV_ERROR_SHAPE = 5,
    /// Strides that are not allowed: a head dim that is not contiguous, an output that overlaps itself.
    QKV_ERROR_STRIDES = 6,
    /// A tensor leaves the buffer that its descriptor names.
    QKV_ERROR_OUT_OF_BOUNDS = 7,
    /// Sizes and strides reach further than addresses do.
    QKV_ERROR_TOO_LARGE = 8,
    /// A tensor of a type that this argument does not take.
    QKV_ERROR_DTYPE = 9,
    /// An output shares memory with an input or another output.
    QKV_ERROR_OVERLAP = 10,
    /// A handle that is not live: never made, destroyed already, or of another kind.
    QKV_ERROR_HANDLE = 11,
    /// A sequence of a paged cache that is not live.
    QKV_ERROR_SEQUENCE = 12,
    /// The new tokens do not fit the cache.
    QKV_ERROR_FULL = 13,
    /// Memory cannot be had.
    QKV_ERROR_MEMORY = 14,
    /// Options that do not go together, or that this version does not know.
    QKV_ERROR_NOT_SUPPORTED = 15,
    /// QKV_ISA asks for an instruction set that cannot be used.
    QKV_ERROR_ISA = 16,
    /// An error inside qkv: please report it. Outputs may have been written to.
    QKV_ERROR_INTERNAL = 17,
}

use qkv_status::*;

/// A refusal.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) status: qkv_status,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(status: qkv_status, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    /// A NULL that is not allowed.
    pub(crate) fn null(argument: &str) -> Self {
        Self::new(QKV_ERROR_NULL, format!("{argument}: NULL, expected an address"))
    }

    /// A refused view.
    pub(crate) fn tensor(argument: &str, error: &TensorError) -> Self {
        let status = match error {
            TensorError::TooLarge { .. } => QKV_ERROR_TOO_LARGE,
            TensorError::OutOfBounds { .. } => QKV_ERROR_OUT_OF_BOUNDS,
            TensorError::LastAxisNotContiguous { .. } | TensorError::Overlapping { .. } => QKV_ERROR_STRIDES,
            TensorError::ScalesDoNotFit { .. } => QKV_ERROR_SHAPE,
            _ => QKV_ERROR_VALUE,
        };
        Self::new(status, format!("{argument}: {error}"))
    }
}

impl From<AttentionError> for Failure {
    fn from(error: AttentionError) -> Self {
        use AttentionError as E;
        let status = match &error {
            E::ShapeMismatch { .. }
            | E::ZeroSize { .. }
            | E::HeadsNotDivisible { .. }
            | E::LseLength { .. }
            | E::DoesNotBroadcast { .. }
            | E::Count { .. } => QKV_ERROR_SHAPE,
            E::TooLarge { .. } | E::TooLong { .. } => QKV_ERROR_TOO_LARGE,
            E::NotTogether { .. } => QKV_ERROR_NOT_SUPPORTED,
            E::Isa(_) => QKV_ERROR_ISA,
            _ => QKV_ERROR_VALUE,
        };
        Self::new(status, error.to_string())
    }
}

impl From<CacheError> for Failure {
    fn from(error: CacheError) -> Self {
        use CacheError as E;
        let status = match &error {
            E::Group { .. } | E::Shape { .. } => QKV_ERROR_SHAPE,
            E::TooLarge { .. } => QKV_ERROR_MEMORY,
            E::Type { .. } => QKV_ERROR_DTYPE,
            E::Full { .. } | E::TooMany { .. } | E::PoolFull { .. } => QKV_ERROR_FULL,
            E::Stale { .. } => QKV_ERROR_SEQUENCE,
            _ => QKV_ERROR_VALUE,
        };
        Self::new(status, error.to_string())
    }
}

impl From<GemmError> for Failure {
    fn from(error: GemmError) -> Self {
        use GemmError as E;
        let status = match &error {
            E::Length { .. } | E::BeforeStart { .. } => QKV_ERROR_OUT_OF_BOUNDS,
            E::Overflow { .. } => QKV_ERROR_TOO_LARGE,
            E::Overlap { .. } => QKV_ERROR_STRIDES,
            E::Shape { .. } | E::Batch { .. } | E::BatchAxes { .. } | E::BiasLength { .. } => QKV_ERROR_SHAPE,
            E::Memory { .. } => QKV_ERROR_MEMORY,
            E::PackedFor { .. } | E::Isa(_) => QKV_ERROR_ISA,
            _ => QKV_ERROR_VALUE,
        };
        Self::new(status, error.to_string())
    }
}

impl From<RotaryError> for Failure {
    fn from(error: RotaryError) -> Self {
        use RotaryError as E;
        let status = match &error {
            E::TooLarge { .. } => QKV_ERROR_MEMORY,
            E::TableRows { .. } | E::Length { .. } | E::PositionCount { .. } => QKV_ERROR_SHAPE,
            _ => QKV_ERROR_VALUE,
        };
        Self::new(status, error.to_string())
    }
}

impl From<IsaError> for Failure {
    fn from(error: IsaError) -> Self {
        Self::new(QKV_ERROR_ISA, error.to_string())
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

fn remember(message: &str) {
    let text = CString::new(message.replace('\0', "\u{fffd}")).unwrap_or_default();
    // A thread that is going away has nobody left to ask.
    let _ = LAST.try_with(|last| last.replace(text));
}

/// Runs `entry`; a panic in it becomes a failure.
fn caught<R>(entry: impl FnOnce() -> Result<R, Failure>) -> Result<R, Failure> {
    // Unwind safety: what a panic may leave half-written is the caller's output, or a cache, whose lock is poisoned then.
    catch_unwind(AssertUnwindSafe(entry)).unwrap_or_else(|panic| {
        let what = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let what = what.or_else(|| panic.downcast_ref::<String>().cloned());
        let what = what.unwrap_or_else(|| "no message".to_owned());
        Err(Failure::new(QKV_ERROR_INTERNAL, format!("an error inside qkv: {what}")))
    })
}

/// Runs an entry of the library: a refusal is remembered for the thread, its code is the answer.
pub(crate) fn guard(entry: impl FnOnce() -> Result<(), Failure>) -> qkv_status {
    match caught(entry) {
        Ok(()) => QKV_OK,
        Err(failure) => {
            remember(&failure.message);
            failure.status
        }
    }
}

/// As [`guard`], for entries that answer with a value: `otherwise` where they are refused.
pub(crate) fn guard_value<R>(otherwise: R, entry: impl FnOnce() -> Result<R, Failure>) -> R {
    caught(entry).unwrap_or_else(|failure| {
        remember(&failure.message);
        otherwise
    })
}

/// What was wrong with the last call of this thread that failed: the argument, what came and what was expected. An empty
/// string where none has failed. It is valid until the next call of this thread fails.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_last_error_message() -> *const c_char {
    const EMPTY: &CStr = c"";
    // The text's memory is its own: the pointer outlives the borrow, until the text is replaced.
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(EMPTY.as_ptr())
}

/// The name of a status, such as "QKV_ERROR_SHAPE"; "unknown" where there is none of this number.
#[unsafe(no_mangle)]
pub extern "C" fn qkv_status_name(status: i32) -> *const c_char {
    const NAMES: [&CStr; 18] = [
        c"QKV_OK",
        c"QKV_ERROR_NULL",
        c"QKV_ERROR_MISALIGNED",
        c"QKV_ERROR_VALUE",
        c"QKV_ERROR_STRUCT_SIZE",
        c"QKV_ERROR_SHAPE",
        c"QKV_ERROR_STRIDES",
        c"QKV_ERROR_OUT_OF_BOUNDS",
        c"QKV_ERROR_TOO_LARGE",
        c"QKV_ERROR_DTYPE",
        c"QKV_ERROR_OVERLAP",
        c"QKV_ERROR_HANDLE",
        c"QKV_ERROR_SEQUENCE",
        c"QKV_ERROR_FULL",
        c"QKV_ERROR_MEMORY",
        c"QKV_ERROR_NOT_SUPPORTED",
        c"QKV_ERROR_ISA",
        c"QKV_ERROR_INTERNAL",
    ];
    usize::try_from(status).ok().and_then(|status| NAMES.get(status)).unwrap_or(&c"unknown").as_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last() -> String {
        // SAFETY: the message is a C string, valid until the next failure of this thread.
        unsafe { CStr::from_ptr(qkv_last_error_message()) }.to_str().unwrap_or("not UTF-8").to_owned()
    }

    #[test]
    fn a_panic_becomes_a_status() {
        assert_eq!(guard(|| panic!("boom {}", 1)), QKV_ERROR_INTERNAL);
        assert_eq!(last(), "an error inside qkv: boom 1");
        assert_eq!(guard_value(7, || panic!("again")), 7);
        assert_eq!(last(), "an error inside qkv: again");
    }

    #[test]
    fn messages_are_per_thread_and_hold_no_zero() {
        assert_eq!(guard(|| Err(Failure::new(QKV_ERROR_VALUE, "a\0b"))), QKV_ERROR_VALUE);
        assert_eq!(last(), "a\u{fffd}b");
        let other = std::thread::spawn(last).join();
        assert_eq!(other.ok().as_deref(), Some(""));
        assert_eq!(guard(|| Ok(())), QKV_OK);
        assert_eq!(last(), "a\u{fffd}b");
    }

    #[test]
    fn names() {
        for (status, name) in [
            (QKV_OK as i32, "QKV_OK"),
            (QKV_ERROR_OVERLAP as i32, "QKV_ERROR_OVERLAP"),
            (QKV_ERROR_INTERNAL as i32, "QKV_ERROR_INTERNAL"),
            (18, "unknown"),
            (-1, "unknown"),
        ] {
            // SAFETY: names are C strings.
            assert_eq!(unsafe { CStr::from_ptr(qkv_status_name(status)) }.to_str(), Ok(name));
        }
    }
}
