//! `include/qkv.h` is what cbindgen makes of the sources. `QKV_WRITE_HEADER=1 cargo test -p qkv-capi --test header` writes
//! it anew.

use std::path::Path;

/// The files of the header, in its order.
const SOURCES: [&str; 11] = [
    "types.rs",
    "lists.rs",
    "status.rs",
    "threads.rs",
    "rotary.rs",
    "options.rs",
    "attention.rs",
    "plan.rs",
    "cache.rs",
    "paged.rs",
    "paged_decode.rs",
];

fn made() -> Result<String, Box<dyn std::error::Error>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut builder =
        cbindgen::Builder::new().with_config(cbindgen::Config::from_file(folder.join("cbindgen.toml"))?);
    for file in SOURCES.into_iter().chain(["gemm.rs"]) {
        builder = builder.with_src(folder.join("src").join(file));
    }
    let mut bytes = Vec::new();
    builder.generate()?.write(&mut bytes);
    Ok(String::from_utf8(bytes)?)
}

#[test]
fn the_header_is_current() -> Result<(), Box<dyn std::error::Error>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/qkv.h");
    let made = made()?;
    if std::env::var_os("QKV_WRITE_HEADER").is_some() {
        std::fs::write(&path, &made)?;
    }
    let committed = std::fs::read_to_string(&path)?;
    let differs = made.lines().zip(committed.lines()).position(|(made, committed)| made != committed);
    assert!(
        made == committed,
        "include/qkv.h differs from the sources from line {} on: write it with QKV_WRITE_HEADER=1",
        differs.map_or(made.lines().count().min(committed.lines().count()), |line| line) + 1
    );
    Ok(())
}

#[test]
fn the_header_has_every_function() -> Result<(), Box<dyn std::error::Error>> {
    let made = made()?;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut functions = 0;
    for entry in std::fs::read_dir(folder)? {
        let text = std::fs::read_to_string(entry?.path())?;
        for line in text.lines().filter(|line| line.starts_with("pub ") && line.contains("extern \"C\" fn "))
        {
            let name = line.split("fn ").nth(1).and_then(|rest| rest.split('(').next()).unwrap_or_default();
            assert!(made.contains(&format!("{name}(")), "{name} is not in the header");
            functions += 1;
        }
    }
    assert!(functions > 40, "{functions} functions found");
    Ok(())
}
