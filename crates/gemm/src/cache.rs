//! Sizes of the data caches, read once per process.
//!
//! Blocks are sized by them (see `params.rs`), and `qkv info` prints them. Sources, in order: the CPU itself on x86-64
//! (`cpuid` leaf 4 on Intel, leaf 0x8000_001D with the same layout on AMD and Hygon), the kernel's files on Linux, and
//! sizes that every CPU of the last ten years has. Nothing here can fail, and nothing that is computed depends on it:
//! only `KC` decides the order of a sum, and that is a constant.

use std::sync::OnceLock;

/// Where [`CacheInfo`] has its numbers from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheSource {
    /// The CPU's own description of itself.
    Cpuid,
    /// The files of the Linux kernel.
    Sysfs,
    /// Nothing was found: assumed sizes.
    Assumed,
}

/// Sizes of the caches that a core sees, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheInfo {
    /// First-level data cache of one core.
    pub l1d: usize,
    /// Second-level cache (of one core on most CPUs).
    pub l2: usize,
    /// Third-level cache, shared by several cores; 0 where there is none.
    pub l3: usize,
    /// Where the numbers come from.
    pub source: CacheSource,
}

/// Levels 1 to 3 while they are collected; 0 is unknown.
type Levels = [usize; 3];

impl CacheInfo {
    /// What is assumed where nothing can be found out: 32 KiB, 256 KiB, no third level. All CPUs with AVX2 or NEON
    /// and four-wide issue have at least this.
    const ASSUMED: Self = Self { l1d: 32 << 10, l2: 256 << 10, l3: 0, source: CacheSource::Assumed };

    /// The caches of this machine (of the core that asked first, where cores differ).
    #[must_use]
    pub fn get() -> Self {
        static INFO: OnceLock<CacheInfo> = OnceLock::new();
        *INFO.get_or_init(|| {
            Self::from_levels(cpuid(), CacheSource::Cpuid)
                .or_else(|| Self::from_levels(sysfs(), CacheSource::Sysfs))
                .unwrap_or(Self::ASSUMED)
        })
    }

    /// A description, where the first two levels were found and are not absurd (hypervisors report zeros).
    fn from_levels(levels: Option<Levels>, source: CacheSource) -> Option<Self> {
        let [l1d, l2, l3] = levels?;
        ((4 << 10..=4 << 20).contains(&l1d) && l2 >= l1d).then_some(Self { l1d, l2, l3, source })
    }
}

/// The cache descriptors of the CPU: one sub-leaf per cache, with its type, level and geometry.
#[cfg(target_arch = "x86_64")]
fn cpuid() -> Option<Levels> {
    use core::arch::x86_64::{__cpuid, __cpuid_count};

    let highest = __cpuid(0).eax;
    let highest_extended = __cpuid(0x8000_0000).eax;
    // AMD: bit 22 of ECX of leaf 0x8000_0001 ("topology extensions") announces leaf 0x8000_001D.
    let amd = highest_extended >= 0x8000_001D && __cpuid(0x8000_0001).ecx & (1 << 22) != 0;
    let leaf = match (amd, highest >= 4) {
        (true, _) => 0x8000_001D,
        (false, true) => 4,
        (false, false) => return None,
    };
    let mut levels = [0; 3];
    // No CPU has more than a handful of caches; the bound is against one that never says "no more".
    for index in 0..16 {
        let cache = __cpuid_count(leaf, index);
        let (kind, level) = (cache.eax & 0x1F, (cache.eax >> 5 & 7) as usize);
        match kind {
            0 => break,
            // 1 is data, 2 instructions, 3 both.
            1 | 3 if (1..=3).contains(&level) => {
                let ways = (cache.ebx >> 22) as usize + 1;
                let partitions = (cache.ebx >> 12 & 0x3FF) as usize + 1;
                let line = (cache.ebx & 0xFFF) as usize + 1;
                let sets = cache.ecx as usize + 1;
                levels[level - 1] = ways * partitions * line * sets;
            }
            _ => {}
        }
    }
    Some(levels)
}

#[cfg(not(target_arch = "x86_64"))]
fn cpuid() -> Option<Levels> {
    None
}

/// What the Linux kernel says about core 0; None elsewhere, as the files are missing.
fn sysfs() -> Option<Levels> {
    let mut levels = [0; 3];
    for index in 0..16 {
        let read = |file: &str| {
            std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{file}"))
        };
        let (Ok(level), Ok(kind), Ok(size)) = (read("level"), read("type"), read("size")) else { break };
        let level = level.trim().parse().unwrap_or(0);
        if kind.trim() != "Instruction" && (1..=3).contains(&level) {
            levels[level - 1] = parse_size(size.trim())?;
        }
    }
    Some(levels)
}

/// The kernel's way of writing sizes: "32K", "1M".
fn parse_size(text: &str) -> Option<usize> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 10),
        b'M' => (&text[..text.len() - 1], 20),
        b'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.parse::<usize>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_plausible() {
        let info = CacheInfo::get();
        assert!((4 << 10..=1 << 20).contains(&info.l1d), "{info:?}");
        assert!(info.l2 >= info.l1d, "{info:?}");
        assert!(info.l3 == 0 || info.l3 >= info.l2, "{info:?}");
    }

    #[test]
    fn kernel_sizes_parse() {
        assert_eq!(parse_size("32K"), Some(32 << 10));
        assert_eq!(parse_size("8M"), Some(8 << 20));
        assert_eq!(parse_size("512"), Some(512));
        for bad in ["", "K", "-1K", "1T", "99999999999999999999G"] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
    }

    #[test]
    fn absurd_levels_are_not_believed() {
        assert_eq!(CacheInfo::from_levels(Some([0, 0, 0]), CacheSource::Cpuid), None);
        assert_eq!(CacheInfo::from_levels(Some([32 << 10, 1 << 10, 0]), CacheSource::Cpuid), None);
        assert_eq!(CacheInfo::from_levels(None, CacheSource::Cpuid), None);
    }

    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    #[test]
    fn both_sources_agree_where_both_speak() {
        if let (Some(a), Some(b)) = (cpuid(), sysfs())
            && a[0] != 0
            && b[0] != 0
        {
            assert_eq!(a[0], b[0], "L1d by cpuid {a:?}, by the kernel {b:?}");
        }
    }
}
