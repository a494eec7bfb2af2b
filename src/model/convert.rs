//! A model written as a folder in the diffusers layout: the files that are read of it, each part's weights in one.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::{Map, json};
use tempfile::TempDir;

use super::ModelFiles;
use super::layout::{self, Kind, Part};
use super::weights::Weights;
use crate::device::Placement;

/// Where a model says what its parts are.
const INDEX: &str = "model_index.json";

impl ModelFiles {
    /// Writes the model to `folder`, which must be new or empty, in the diffusers layout: whole or not at all. Weights are in `dtype` (F32,
    /// F16 or BF16), or None: as they are stored; what are no floats stay. `go_on` is asked before each tensor.
    ///
    /// # Errors
    /// A file of the model is missing or damaged, a value is not to be had in `dtype`, the folder is not empty or cannot be written, or
    /// `go_on` says so.
    pub fn save(
        &self,
        folder: &Path,
        dtype: Option<DType>,
        go_on: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let cannot = || format!("cannot write the model to {}", folder.display());
        let dtype = dtype.map(stored_as).transpose()?;
        let place = Place::begin(folder).with_context(cannot)?;
        self.write_parts(place.temporary(), dtype, go_on)?;
        place.commit().with_context(cannot)
    }

    fn write_parts(
        &self,
        folder: &Path,
        dtype: Option<Dtype>,
        go_on: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        for (file, kind) in layout::wanted(&Part::PIPELINE) {
            let path = folder.join(file);
            if let Some(part) = path.parent() {
                fs::create_dir_all(part).with_context(|| cannot_write(file))?;
            }
            let small = match kind {
                Kind::Weights => {
                    let weights = self.weights_of(file)?;
                    write_weights(&weights, dtype, &path, go_on)
                        .with_context(|| cannot_write(file))?;
                    continue;
                }
                Kind::Required => Some(self.read(file)?),
                Kind::Optional => self.try_read(file)?,
            };
            let small = match small {
                None if file == INDEX => Some(index().to_string().into_bytes()),
                small => small,
            };
            if let Some(small) = small {
                write_small(&path, &small).with_context(|| cannot_write(file))?;
            }
        }
        Ok(())
    }

    /// The weights whose file is called `file` in the layout.
    fn weights_of(&self, file: &str) -> Result<Weights> {
        let (part, name) = file.split_once('/').unwrap_or(("", file));
        let stem = name.strip_suffix(".safetensors").unwrap_or(name);
        self.weights(part, stem, &Placement::new(&Device::Cpu, DType::F32))
    }
}

fn cannot_write(file: &str) -> String {
    format!("cannot write {file} of it")
}

fn stored_as(dtype: DType) -> Result<Dtype> {
    Ok(match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        other => bail!("weights are written in F32, F16 or BF16, not in {other:?}"),
    })
}

/// What `model_index.json` of the published model says.
fn index() -> serde_json::Value {
    json!({
        "_class_name": "StableDiffusionLatentUpscalePipeline",
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    })
}

fn write_small(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    Ok(file.sync_all()?)
}

/// A tensor as it will be written.
struct Written {
    name: String,
    shape: Vec<usize>,
    /// In the model.
    from: Dtype,
    to: Dtype,
}

impl Written {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.to.bitsize() / 8
    }
}

/// Writes a safetensors file, a tensor at a time.
fn write_weights(
    weights: &Weights,
    dtype: Option<Dtype>,
    path: &Path,
    go_on: &mut dyn FnMut() -> Result<()>,
) -> Result<()> {
    let written = |(name, from, shape): (String, Dtype, Vec<usize>)| Written {
        to: dtype.filter(|_| is_float(from)).unwrap_or(from),
        name,
        shape,
        from,
    };
    let mut tensors: Vec<Written> = weights.tensors().into_iter().map(written).collect();
    // Wide numbers first, so that each lies at a multiple of its width.
    tensors.sort_by(|a, b| {
        let width = b.to.bitsize().cmp(&a.to.bitsize());
        width.then_with(|| a.name.cmp(&b.name))
    });
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let header = header(&tensors);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for tensor in &tensors {
        go_on()?;
        let Written { name, shape, .. } = tensor;
        if tensor.from == tensor.to {
            let bytes = weights
                .raw(name)
                .with_context(|| format!("{name} is missing"))?;
            file.write_all(&bytes)?;
        } else {
            let values = weights.f32(shape, name)?;
            file.write_all(&converted(&values, tensor.to).with_context(|| name.clone())?)?;
        }
        weights.release(name);
    }
    let file = file
        .into_inner()
        .map_err(std::io::IntoInnerError::into_error)?;
    Ok(file.sync_all()?)
}

fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// What a safetensors file begins with, behind its length: where each tensor lies. transformers reads no file that does not say
/// `pt`.
fn header(tensors: &[Written]) -> Vec<u8> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.bytes();
        let entry =
            json!({"dtype": tensor.to, "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.name.clone(), entry);
        start = end;
    }
    let mut bytes = serde_json::Value::Object(header).to_string().into_bytes();
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    bytes
}

/// Values in another type, lowest byte first.
///
/// # Errors
/// One is beyond what the type holds.
fn converted(values: &[f32], to: Dtype) -> Result<Vec<u8>> {
    match to {
        Dtype::F16 => halves(values, to, |half: f16| (half.to_f32(), half.to_le_bytes())),
        Dtype::BF16 => halves(values, to, |half: bf16| (half.to_f32(), half.to_le_bytes())),
        _ => Ok(values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect()),
    }
}

/// The same of a type of 16 bits: `own` gives what a number of it is, and its bytes.
fn halves<T: Copy + Default>(
    values: &[f32],
    to: Dtype,
    own: impl Fn(T) -> (f32, [u8; 2]),
) -> Result<Vec<u8>>
where
    [T]: HalfFloatSliceExt,
{
    let mut rounded = vec![T::default(); values.len()];
    rounded.convert_from_f32_slice(values);
    let mut bytes = Vec::with_capacity(2 * values.len());
    for (half, value) in rounded.into_iter().zip(values) {
        let (half, own) = own(half);
        ensure!(
            half.is_finite() || !value.is_finite(),
            "it holds {value}, which {to:?} does not: take --dtype bf16 or f32"
        );
        bytes.extend_from_slice(&own);
    }
    Ok(bytes)
}

/// A folder that is being written under a temporary name beside its own. Dropped, it goes, and with it the folders that were made to
/// hold it.
struct Place {
    target: PathBuf,
    /// Some until it is in its place.
    temporary: Option<TempDir>,
    /// Folders above it that were missing, the lowest first.
    made: Vec<PathBuf>,
}

impl Place {
    /// # Errors
    /// The folder has something in it, or none can be made there.
    fn begin(target: &Path) -> Result<Self> {
        check_new_or_empty(target)?;
        let above = match target.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let missing = above.ancestors().take_while(|folder| !folder.exists());
        let mut place = Self {
            target: target.to_owned(),
            temporary: None,
            made: missing.map(Path::to_owned).collect(),
        };
        fs::create_dir_all(above)?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(".sd-upscale-");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // As any folder: what others may do the system says (umask).
            builder.permissions(fs::Permissions::from_mode(0o777));
        }
        place.temporary = Some(builder.tempdir_in(above)?);
        Ok(place)
    }

    fn temporary(&self) -> &Path {
        self.temporary.as_ref().map_or(&self.target, TempDir::path)
    }

    fn commit(mut self) -> Result<()> {
        if self.target.exists() {
            fs::remove_dir(&self.target)?;
        }
        fs::rename(self.temporary(), &self.target)?;
        if let Some(temporary) = self.temporary.take() {
            let _in_its_place = temporary.keep();
        }
        self.made.clear();
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.temporary = None;
        for folder in &self.made {
            // One that holds something by now stays.
            let _ = fs::remove_dir(folder);
        }
    }
}

fn check_new_or_empty(target: &Path) -> Result<()> {
    if !target.exists() {
        return Ok(());
    }
    ensure!(
        target.is_dir(),
        "there is a file of this name: give a folder that is new or empty"
    );
    let mut held = fs::read_dir(target)?;
    ensure!(
        held.next().is_none(),
        "the folder is not empty, and nothing is written over: give one that is new or empty"
    );
    Ok(())
}
