//! Which instruction sets there are, which this CPU has, and which one this process uses (`QKV_ISA`).

use core::fmt;
use std::sync::OnceLock;

use crate::{Portable, Simd, SimdOp};

/// The name of an instruction set, whether or not this CPU or this build has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum IsaKind {
    /// Four lanes on the `wide` crate: SSE2, NEON or simd128 as compiled, else scalar code.
    Portable,
    /// x86-64 with AVX2, FMA and F16C: eight lanes, 16 registers.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL: sixteen lanes, 32 registers.
    Avx512,
    /// AArch64 NEON: four lanes, 32 registers.
    Neon,
    /// WebAssembly simd128: four lanes.
    Simd128,
}

impl IsaKind {
    /// All names, in the order of preference from the lowest.
    pub const ALL: [IsaKind; 5] =
        [IsaKind::Portable, IsaKind::Simd128, IsaKind::Neon, IsaKind::Avx2, IsaKind::Avx512];

    /// The name as `QKV_ISA` and `--isa` spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            IsaKind::Portable => "portable",
            IsaKind::Avx2 => "avx2",
            IsaKind::Avx512 => "avx512",
            IsaKind::Neon => "neon",
            IsaKind::Simd128 => "simd128",
        }
    }

    /// The instruction set of that name.
    ///
    /// # Errors
    /// [`IsaError::Unknown`] where there is none.
    pub fn parse(name: &str) -> Result<Self, IsaError> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| IsaError::Unknown { given: name.to_owned() })
    }
}

impl fmt::Display for IsaKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why an instruction set cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IsaError {
    /// No instruction set has this name.
    Unknown {
        /// The name that came.
        given: String,
    },
    /// This CPU lacks it.
    NotOnThisCpu {
        /// What was asked for.
        asked: IsaKind,
    },
    /// qkv has no kernels for it (yet), or not for the architecture it was compiled for.
    NotBuilt {
        /// What was asked for.
        asked: IsaKind,
    },
    /// The process has already computed with another one.
    AlreadyChosen {
        /// What was asked for.
        asked: IsaKind,
        /// What is in use.
        active: IsaKind,
    },
}

impl fmt::Display for IsaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IsaError::Unknown { given } => {
                write!(f, "unknown instruction set \"{given}\": expected one of")?;
                for (i, kind) in IsaKind::ALL.iter().enumerate() {
                    write!(f, "{} {kind}", if i == 0 { "" } else { "," })?;
                }
                Ok(())
            }
            IsaError::NotOnThisCpu { asked } => {
                write!(f, "instruction set \"{asked}\" was asked for, but this CPU lacks it")?;
                write!(f, " (it has:")?;
                for isa in Isa::available() {
                    write!(f, " {}", isa.kind())?;
                }
                write!(f, ")")
            }
            IsaError::NotBuilt { asked } => {
                write!(f, "instruction set \"{asked}\" is not supported by this build of qkv")
            }
            IsaError::AlreadyChosen { asked, active } => write!(
                f,
                "instruction set \"{asked}\" was asked for, but this process already uses \"{active}\""
            ),
        }
    }
}

impl core::error::Error for IsaError {}

/// An instruction set that this CPU has: a token wrapped so that it can be stored.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Isa {
    /// See [`IsaKind::Portable`].
    Portable(Portable),
    /// See [`IsaKind::Avx2`].
    #[cfg(target_arch = "x86_64")]
    Avx2(crate::Avx2),
    /// See [`IsaKind::Avx512`].
    #[cfg(target_arch = "x86_64")]
    Avx512(crate::Avx512),
}

/// What [`Isa::active`] answers: decided once per process.
static ACTIVE: OnceLock<Result<Isa, IsaError>> = OnceLock::new();

impl Isa {
    /// The instruction set that this process uses: `QKV_ISA` where it is set, else the best that the CPU has.
    ///
    /// Decided at the first call; later changes of the environment have no effect.
    ///
    /// # Errors
    /// Where `QKV_ISA` names none, or one that this CPU or this build lacks.
    pub fn active() -> Result<Self, IsaError> {
        ACTIVE.get_or_init(Self::from_environment).clone()
    }

    /// Makes `kind` the instruction set of this process, before anything has asked for [`Isa::active`].
    ///
    /// # Errors
    /// Where this CPU or this build lacks it, or another one is already in use.
    pub fn choose(kind: IsaKind) -> Result<Self, IsaError> {
        let wanted = Self::with_kind(kind)?;
        let active = ACTIVE.get_or_init(|| Ok(wanted)).clone()?;
        if active.kind() == kind {
            Ok(active)
        } else {
            Err(IsaError::AlreadyChosen { asked: kind, active: active.kind() })
        }
    }

    /// The instruction set of that name, where this CPU has it.
    ///
    /// # Errors
    /// [`IsaError::NotOnThisCpu`] or [`IsaError::NotBuilt`].
    pub fn with_kind(kind: IsaKind) -> Result<Self, IsaError> {
        match kind {
            IsaKind::Portable => Ok(Isa::Portable(Portable::new())),
            #[cfg(target_arch = "x86_64")]
            IsaKind::Avx2 => crate::Avx2::new().map(Isa::Avx2).ok_or(IsaError::NotOnThisCpu { asked: kind }),
            #[cfg(target_arch = "x86_64")]
            IsaKind::Avx512 => {
                crate::Avx512::new().map(Isa::Avx512).ok_or(IsaError::NotOnThisCpu { asked: kind })
            }
            _ => Err(IsaError::NotBuilt { asked: kind }),
        }
    }

    /// All instruction sets that this CPU has and qkv knows, the best last.
    #[must_use]
    pub fn available() -> Vec<Self> {
        IsaKind::ALL.into_iter().filter_map(|kind| Self::with_kind(kind).ok()).collect()
    }

    fn from_environment() -> Result<Self, IsaError> {
        match std::env::var("QKV_ISA") {
            Ok(name) => Self::with_kind(IsaKind::parse(&name)?),
            Err(std::env::VarError::NotUnicode(name)) => {
                Err(IsaError::Unknown { given: name.to_string_lossy().into_owned() })
            }
            Err(std::env::VarError::NotPresent) => {
                Ok(Self::available().pop().unwrap_or(Isa::Portable(Portable::new())))
            }
        }
    }

    /// Its name.
    #[must_use]
    pub fn kind(self) -> IsaKind {
        struct Kind;
        impl SimdOp for Kind {
            type Output = IsaKind;
            #[inline(always)]
            fn eval<S: Simd>(self, _: S) -> IsaKind {
                S::KIND
            }
        }
        self.dispatch(Kind)
    }

    /// `f32` lanes in one of its vectors.
    #[must_use]
    pub fn lanes(self) -> usize {
        struct Lanes;
        impl SimdOp for Lanes {
            type Output = usize;
            #[inline(always)]
            fn eval<S: Simd>(self, _: S) -> usize {
                S::LANES
            }
        }
        self.dispatch(Lanes)
    }

    /// Runs `op` compiled for this instruction set.
    #[inline]
    pub fn dispatch<O: SimdOp>(self, op: O) -> O::Output {
        match self {
            Isa::Portable(s) => s.vectorize(op),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(s) => s.vectorize(op),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(s) => s.vectorize(op),
        }
    }
}
