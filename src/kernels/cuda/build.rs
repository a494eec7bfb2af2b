//! Compiles the CUDA kernels beside this file to PTX with `nvcc`, with the feature `cuda`; else nothing.
//!
//! Read from the environment, as by candle's own build: `NVCC`, `CUDA_HOME`, and `CUDA_COMPUTE_CAP`, the oldest card that the
//! kernels are for (75 where it is not set). Where that is older than 80 they are compiled for 80 too: bfloat16 and the wider
//! products of the tensor cores begin there.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::{env, fs};

const SOURCES: &str = "src/kernels/cuda";
/// Capability of the first cards with bfloat16.
const BFLOAT16: u32 = 80;

fn main() {
    println!("cargo::rerun-if-changed={SOURCES}");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    if let Err(message) = build() {
        eprintln!("{message}");
        exit(1);
    }
}

fn build() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let nvcc = nvcc();
    let mut table = String::from("&[\n");
    for source in sources()? {
        let name = source.file_stem().unwrap_or_default().to_string_lossy();
        for capability in capabilities()? {
            let ptx = out.join(format!("{name}_{capability}.ptx"));
            compile(&nvcc, &source, &ptx, capability)?;
            let _ = writeln!(
                table,
                "Module {{ name: {name:?}, capability: {capability}, ptx: include_str!({ptx:?}) }},"
            );
        }
    }
    table.push(']');
    let path = out.join("modules.rs");
    fs::write(&path, table).map_err(|error| format!("cannot write {}: {error}", path.display()))
}

fn sources() -> Result<Vec<PathBuf>, String> {
    let listed =
        fs::read_dir(SOURCES).map_err(|error| format!("cannot list {SOURCES}: {error}"))?;
    let mut sources: Vec<PathBuf> = listed
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    Ok(sources)
}

fn nvcc() -> PathBuf {
    let home = ["CUDA_HOME", "CUDA_PATH"].into_iter().find_map(env::var_os);
    match (env::var_os("NVCC"), home) {
        (Some(nvcc), _) => nvcc.into(),
        (None, Some(home)) => Path::new(&home).join("bin/nvcc"),
        (None, None) => "nvcc".into(),
    }
}

fn capabilities() -> Result<Vec<u32>, String> {
    let oldest = match env::var("CUDA_COMPUTE_CAP") {
        Err(_) => 75,
        Ok(text) => {
            let digits = text.replace('.', "");
            let digits = digits.trim_end_matches(|c: char| c.is_ascii_alphabetic());
            digits.parse().map_err(|_| {
                format!("CUDA_COMPUTE_CAP is `{text}`, expected a number such as 75, 80 or 90")
            })?
        }
    };
    Ok(if oldest < BFLOAT16 {
        vec![oldest, BFLOAT16]
    } else {
        vec![oldest]
    })
}

fn compile(nvcc: &Path, source: &Path, ptx: &Path, capability: u32) -> Result<(), String> {
    let mut command = Command::new(nvcc);
    command.arg("--ptx").arg("-o").arg(ptx).arg(source);
    command.args([&format!("-arch=compute_{capability}"), "-O3", "-std=c++17"]);
    let output = command.output().map_err(|error| {
        format!(
            "cannot run {}: {error}; install the CUDA toolkit and set CUDA_HOME to its folder, or NVCC to its compiler",
            nvcc.display()
        )
    })?;
    if output.status.success() && ptx.exists() {
        return Ok(());
    }
    Err(format!(
        "{command:?} gave no PTX ({}):\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    ))
}
