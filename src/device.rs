//! What the models run on: the CPU, or one or several CUDA cards.

use std::str::FromStr;

#[cfg(feature = "cuda")]
use anyhow::Context;
use anyhow::{Result, bail};
use candle_core::{DType, Device};

/// `--device`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// CUDA where the build and the machine have it, else the CPU.
    Auto,
    Cpu,
    /// Every CUDA card of the machine.
    AllCuda,
    /// Cards by number; a batch is spread over them.
    Cuda(Vec<usize>),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let card = |name: &str| match name {
            "cuda" => Some(0),
            _ => name.strip_prefix("cuda:")?.parse().ok(),
        };
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda:all" => Ok(Self::AllCuda),
            _ => text
                .split(',')
                .map(|name| card(name.trim()))
                .collect::<Option<Vec<usize>>>()
                .map(Self::Cuda)
                .ok_or_else(|| {
                    "expected auto, cpu, cuda, cuda:N, a list such as cuda:0,cuda:1, or cuda:all"
                        .into()
                }),
        }
    }
}

/// The devices of a choice, at least one, and a line to show where `auto` had to settle for the CPU.
///
/// # Errors
/// CUDA was asked for by name and is not to be had; the message says what is missing.
pub fn open(choice: &DeviceChoice) -> Result<(Vec<Device>, Option<String>)> {
    let cards = |numbers: &[usize]| -> Result<Vec<Device>> {
        numbers.iter().map(|&number| cuda(number)).collect()
    };
    match choice {
        DeviceChoice::Cpu => Ok((vec![Device::Cpu], None)),
        DeviceChoice::Cuda(numbers) => Ok((cards(numbers)?, None)),
        DeviceChoice::AllCuda => {
            let mut devices = vec![cuda(0)?];
            while let Ok(device) = cuda(devices.len()) {
                devices.push(device);
            }
            Ok((devices, None))
        }
        DeviceChoice::Auto if !cfg!(feature = "cuda") => Ok((vec![Device::Cpu], None)),
        DeviceChoice::Auto => match cuda(0) {
            Ok(device) => Ok((vec![device], None)),
            Err(error) => Ok((
                vec![Device::Cpu],
                Some(format!("running on the CPU: {error:#}")),
            )),
        },
    }
}

/// The libraries that candle opens on a CUDA device, by the start of their file names.
#[cfg(all(feature = "cuda", unix))]
const LIBRARIES: [(&str, &[&str]); 4] = [
    ("the NVIDIA driver", &["libcuda.so.1", "libcuda.so"]),
    (
        "cuBLAS",
        &["libcublas.so", "libcublas.so.13", "libcublas.so.12"],
    ),
    (
        "cuBLASLt",
        &["libcublasLt.so", "libcublasLt.so.13", "libcublasLt.so.12"],
    ),
    ("cuRAND", &["libcurand.so", "libcurand.so.10"]),
];

/// Looks for the libraries by name before candle does, which would end the program where one is missing.
#[cfg(all(feature = "cuda", unix))]
fn find_libraries() -> Result<()> {
    let mut wanted = LIBRARIES.to_vec();
    if cfg!(feature = "cudnn") {
        wanted.push(("cuDNN", &["libcudnn.so", "libcudnn.so.9"]));
    }
    for (what, names) in wanted {
        let found = names.iter().any(|name| {
            let Ok(name) = std::ffi::CString::new(*name) else {
                return false;
            };
            // SAFETY: a library of the system is opened by its plain name, and stays open.
            !unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_GLOBAL) }.is_null()
        });
        if !found {
            bail!(
                "{what} was not found (looked for {}); install it, or add its folder to LD_LIBRARY_PATH",
                names.join(", ")
            );
        }
    }
    Ok(())
}

#[cfg(all(feature = "cuda", not(unix)))]
fn find_libraries() -> Result<()> {
    Ok(())
}

#[cfg(feature = "cuda")]
fn cuda(number: usize) -> Result<Device> {
    find_libraries()?;
    let opened = std::panic::catch_unwind(|| Device::new_cuda(number));
    match opened {
        Ok(device) => device.with_context(|| format!("CUDA device {number} cannot be used")),
        Err(_) => bail!("CUDA device {number} cannot be used: its libraries do not fit this build"),
    }
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: usize) -> Result<Device> {
    bail!(
        "this build runs on the CPU alone: build it with `cargo build --release --features cuda,cudnn`, or use --device cpu"
    )
}

/// The precision of a run on `device` where none is asked for: float16 on CUDA, float32 on the CPU.
pub fn default_dtype(device: &Device) -> DType {
    match device {
        Device::Cpu => DType::F32,
        _ => DType::F16,
    }
}

/// A short name for messages.
pub fn name(device: &Device) -> String {
    match device {
        Device::Cpu => "cpu".into(),
        other => format!("{:?}", other.location()).to_lowercase(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_they_are_written() {
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(vec![0])));
        assert_eq!("cuda:0,cuda:3".parse(), Ok(DeviceChoice::Cuda(vec![0, 3])));
        assert_eq!("cuda:all".parse(), Ok(DeviceChoice::AllCuda));
        assert!("gpu".parse::<DeviceChoice>().is_err());
        assert!("cuda:x".parse::<DeviceChoice>().is_err());
    }
}
