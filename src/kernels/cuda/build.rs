//! Compiles the CUDA kernels beside this file to PTX with `nvcc`, with the feature `cuda`, and says where git notes which commit is
//! checked out.
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
    let with_cuda = env::var_os("CARGO_FEATURE_CUDA").is_some();
    let built = point_to_head_log().and_then(|()| if with_cuda { build() } else { Ok(()) });
    if let Err(message) = built {
        eprintln!("{message}");
        exit(1);
    }
}

/// Writes `head_log.rs`: `Some` of the bytes of git's log of what was checked out here, or `None` without git. The program alone
/// includes it, so that a commit compiles the program anew, and neither the library nor the kernels: this script does not run then.
fn point_to_head_log() -> Result<(), String> {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("cargo sets its folder")?);
    let log = git_folder(&root).map(|folder| folder.join("logs/HEAD"));
    let code = match log.filter(|log| log.is_file()) {
        Some(log) => format!("Some(include_bytes!({log:?}) as &[u8])"),
        None => "None::<&[u8]>".into(),
    };
    let path = out_folder()?.join("head_log.rs");
    // Written only where it differs: its time would have the program compiled anew.
    if fs::read_to_string(&path).is_ok_and(|old| old == code) {
        return Ok(());
    }
    fs::write(&path, code).map_err(|error| format!("cannot write {}: {error}", path.display()))
}

/// Where git keeps what is of this checkout: `.git`, or what `.git` names where it is a worktree's. None outside a clone, as from a
/// source archive; a repository around the folder is another's.
fn git_folder(root: &Path) -> Option<PathBuf> {
    let git = root.join(".git");
    let (folder, watched) = if git.is_dir() {
        (git.clone(), git.join("config"))
    } else {
        let text = fs::read_to_string(&git).ok()?;
        let named = text.trim().strip_prefix("gitdir: ")?;
        (root.join(named), git)
    };
    // What is there as long as git is, and no commit changes.
    println!("cargo::rerun-if-changed={}", watched.display());
    Some(folder)
}

fn out_folder() -> Result<PathBuf, String> {
    Ok(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?.into())
}

fn build() -> Result<(), String> {
    let out = out_folder()?;
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
