//! The choice of an instruction set: names, errors, `QKV_ISA`, and that a process stays with what it has chosen.
//!
//! The choice is made once per process, so the tests about it start this test program again, as a child with an
//! environment of its own, and run one of its ignored tests there.

use std::process::Command;

use qkv_simd::{Isa, IsaError, IsaKind};

#[test]
fn every_name_is_parsed() {
    for kind in IsaKind::ALL {
        assert_eq!(IsaKind::parse(kind.name()), Ok(kind));
        assert_eq!(kind.to_string(), kind.name());
    }
    let names = IsaKind::ALL.map(IsaKind::name);
    for name in ["portable", "avx2", "avx512", "neon", "simd128"] {
        assert!(names.contains(&name), "{name}");
    }
}

#[test]
fn an_unknown_name_is_answered_with_the_known_ones() {
    for given in ["", "AVX2", "avx2 ", "sse4.1", "avx-512"] {
        let error = IsaKind::parse(given).unwrap_err();
        assert_eq!(error, IsaError::Unknown { given: given.to_owned() });
        let text = error.to_string();
        assert!(text.contains(&format!("\"{given}\"")), "{text}");
        for kind in IsaKind::ALL {
            assert!(text.contains(kind.name()), "{text}");
        }
    }
}

#[test]
fn errors_name_what_was_asked_for() {
    let portable = IsaKind::Portable;
    let missing = IsaError::NotOnThisCpu { asked: IsaKind::Avx2 }.to_string();
    assert!(missing.contains("\"avx2\"") && missing.contains("this CPU lacks it"), "{missing}");
    // And what could be asked for instead.
    assert!(missing.contains(portable.name()), "{missing}");
    let not_built = IsaError::NotBuilt { asked: IsaKind::Neon }.to_string();
    assert!(not_built.contains("\"neon\"") && not_built.contains("not supported"), "{not_built}");
    let late = IsaError::AlreadyChosen { asked: IsaKind::Avx2, active: portable }.to_string();
    assert!(late.contains("\"avx2\"") && late.contains("already uses \"portable\""), "{late}");
}

#[test]
fn what_has_no_kernels_is_not_built() {
    for kind in [IsaKind::Neon, IsaKind::Simd128] {
        assert_eq!(Isa::with_kind(kind).unwrap_err(), IsaError::NotBuilt { asked: kind });
    }
    #[cfg(not(target_arch = "x86_64"))]
    for kind in [IsaKind::Avx2, IsaKind::Avx512] {
        assert_eq!(Isa::with_kind(kind).unwrap_err(), IsaError::NotBuilt { asked: kind });
    }
}

#[test]
fn the_available_ones_are_those_that_can_be_had() {
    let available: Vec<IsaKind> = Isa::available().into_iter().map(Isa::kind).collect();
    assert_eq!(available[0], IsaKind::Portable, "every CPU has it");
    for kind in IsaKind::ALL {
        assert_eq!(available.contains(&kind), Isa::with_kind(kind).is_ok(), "{kind}");
    }
    // In the order of preference.
    let rank = |kind: &IsaKind| IsaKind::ALL.iter().position(|k| k == kind);
    assert!(available.is_sorted_by_key(rank));
    for &kind in &available {
        assert_eq!(Isa::with_kind(kind).map(Isa::kind), Ok(kind));
    }
    #[cfg(target_arch = "x86_64")]
    {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        assert_eq!(available.contains(&IsaKind::Avx2), has);
        let has = has
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        assert_eq!(available.contains(&IsaKind::Avx512), has);
    }
}

/// Set for the children: where someone runs the ignored tests by themselves, these have nothing to say.
const CHILD: &str = "QKV_SIMD_TEST_CHILD";

fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// Runs one of the ignored tests below in a process of its own, and hands back what it wrote where it failed.
fn child(test: &str, qkv_isa: Option<&str>) -> Result<(), String> {
    let program = std::env::current_exe().expect("this program has a path");
    let mut command = Command::new(program);
    command
        .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
        .env(CHILD, "1")
        .env_remove("QKV_ISA");
    if let Some(value) = qkv_isa {
        command.env("QKV_ISA", value);
    }
    let output = command.output().expect("it can be started again");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    // A misspelt name would run no test, and succeed.
    assert!(text.contains("running 1 test"), "{text}");
    if output.status.success() { Ok(()) } else { Err(text) }
}

#[test]
#[ignore = "runs in a child: the choice is made once per process"]
fn child_without_a_wish() {
    if !is_child() {
        return;
    }
    let best = Isa::available().pop().expect("there is always the portable one").kind();
    assert_eq!(Isa::active().map(Isa::kind), Ok(best));
    // Once active, the same may be chosen again, and no other.
    assert_eq!(Isa::choose(best).map(Isa::kind), Ok(best));
    for isa in Isa::available().into_iter().filter(|isa| isa.kind() != best) {
        let refusal = IsaError::AlreadyChosen { asked: isa.kind(), active: best };
        assert_eq!(Isa::choose(isa.kind()).unwrap_err(), refusal);
    }
    let refusal = IsaError::NotBuilt { asked: IsaKind::Simd128 };
    assert_eq!(Isa::choose(IsaKind::Simd128).unwrap_err(), refusal);
    assert_eq!(Isa::active().map(Isa::kind), Ok(best));
}

#[test]
#[ignore = "runs in a child: the choice is made once per process"]
fn child_that_chooses_first() {
    if !is_child() {
        return;
    }
    // A choice that cannot be had leaves everything open.
    assert!(Isa::choose(IsaKind::Simd128).is_err());
    assert_eq!(Isa::choose(IsaKind::Portable).map(Isa::kind), Ok(IsaKind::Portable));
    assert_eq!(Isa::active().map(Isa::kind), Ok(IsaKind::Portable));
}

#[test]
#[ignore = "runs in a child: the choice is made once per process"]
fn child_that_obeys_the_environment() {
    if !is_child() {
        return;
    }
    let wish = std::env::var("QKV_ISA").expect("the parent sets it");
    let active = Isa::active().map(Isa::kind);
    assert_eq!(active, IsaKind::parse(&wish), "{wish}");
    // Later changes of mind have no effect.
    assert_eq!(Isa::active().map(Isa::kind), active);
}

#[test]
#[ignore = "runs in a child: the choice is made once per process"]
fn child_that_cannot_obey() {
    if !is_child() {
        return;
    }
    let error = Isa::active().unwrap_err();
    // The error stays: nothing else is used in silence.
    assert_eq!(Isa::choose(IsaKind::Portable).unwrap_err(), error);
    panic!("{error}");
}

#[test]
fn a_process_stays_with_its_choice() {
    assert_eq!(child("child_without_a_wish", None), Ok(()));
}

#[test]
fn a_choice_may_come_first() {
    assert_eq!(child("child_that_chooses_first", None), Ok(()));
    // A choice in the program goes before one in the environment.
    assert_eq!(child("child_that_chooses_first", Some("simd128")), Ok(()));
}

#[test]
fn the_environment_is_obeyed() {
    for isa in Isa::available() {
        assert_eq!(child("child_that_obeys_the_environment", Some(isa.kind().name())), Ok(()));
    }
}

#[test]
fn what_cannot_be_obeyed_is_an_error() {
    let text = child("child_that_cannot_obey", Some("simd128")).unwrap_err();
    assert!(text.contains("instruction set \"simd128\" is not supported by this build"), "{text}");
    let text = child("child_that_cannot_obey", Some("fastest")).unwrap_err();
    assert!(text.contains("unknown instruction set \"fastest\": expected one of portable,"), "{text}");
    let text = child("child_that_cannot_obey", Some("")).unwrap_err();
    assert!(text.contains("unknown instruction set \"\""), "{text}");
}
