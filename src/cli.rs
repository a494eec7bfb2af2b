//! The command line: what can be said, checked once and turned into a [`Job`].

use std::ffi::OsString;
use std::path::PathBuf;

use candle_core::DType;
use clap::{Parser, ValueEnum};
use sd_upscale::Settings;
use sd_upscale::device::DeviceChoice;
use sd_upscale::latents::LatentScale;
use sd_upscale::limits::ReadLimits;
use sd_upscale::model::hub;
use sd_upscale::pipeline::sampler::Schedule;
use sd_upscale::plan::{Output, Request, Shard, Source, Template, UsageError};

/// Upscale images and latents 2x with the Stable Diffusion x2 latent upscaler
#[derive(Parser, Debug)]
#[command(version, max_term_width = 100, after_help = EXAMPLES)]
pub struct Args {
    /// Image, latents file (.safetensors, .latent, .npz), folder, or - for standard input
    #[arg(required_unless_present = "export_tiny")]
    input: Vec<OsString>,

    /// File (one input), folder (several inputs or a folder), or - for standard output
    ///
    /// The extension picks the format: png, jpg, webp, tif, bmp; .safetensors and .latent write the upscaled
    /// latents and decode nothing. Without it, the result goes beside the input as NAME-2x.EXT.
    #[arg(short, long, value_name = "PATH")]
    output: Option<OsString>,

    /// What the image shows [default: the prompt in the input's metadata, else empty]
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,

    /// What to steer away from; needs a guidance above 1
    #[arg(short, long, value_name = "TEXT")]
    negative_prompt: Option<String>,

    /// Denoising steps
    #[arg(short, long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    steps: u32,

    /// 0: ignore the prompt; above 0 up to 1: one pass; above 1: classifier-free guidance, two passes
    #[arg(short, long, value_name = "G", default_value_t = 1.0, value_parser = guidance, allow_negative_numbers = true)]
    guidance: f64,

    /// Noise seed: the noise of PyTorch's CPU generator; every input starts from the same
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        allow_negative_numbers = true
    )]
    seed: u64,

    /// Noise schedule; log-linear is what the published pipeline runs
    #[arg(long, value_enum, default_value_t = ScheduleName::Karras)]
    schedule: ScheduleName,

    /// Folder in the diffusers layout, Hub repository, or `tiny`, the small built-in model
    #[arg(long, value_name = "DIR|REPO|tiny", default_value = hub::DEFAULT_REPO, help_heading = "Model")]
    model: String,

    /// Branch, tag or commit of the model's repository [default: a pinned commit]
    #[arg(long, value_name = "REV", help_heading = "Model")]
    revision: Option<String>,

    /// Another Stable Diffusion VAE, e.g. stabilityai/sd-vae-ft-mse [default: the model's own]
    #[arg(long, value_name = "DIR|FILE|REPO", help_heading = "Model")]
    vae: Option<String>,

    /// auto, cpu, cuda, cuda:N, a list such as cuda:0,cuda:1, or cuda:all
    #[arg(
        long,
        value_name = "DEVICE",
        default_value = "auto",
        help_heading = "Model"
    )]
    device: DeviceChoice,

    /// Precision; auto: f16 on CUDA (the VAE in f32), f32 on the CPU
    #[arg(long, value_enum, default_value_t = DtypeName::Auto, help_heading = "Model")]
    dtype: DtypeName,

    /// Write the built-in model to a folder in the diffusers layout, and end
    #[arg(
        long,
        value_name = "DIR",
        help_heading = "Model",
        conflicts_with = "input"
    )]
    pub export_tiny: Option<PathBuf>,

    /// Read folders within folders; the output folder gets the same tree
    #[arg(short, long, help_heading = "Many files")]
    recursive: bool,

    /// Of what folders hold, only files that match (repeatable)
    #[arg(long, value_name = "GLOB", help_heading = "Many files")]
    include: Vec<String>,

    /// Of what folders hold, no files that match (repeatable)
    #[arg(long, value_name = "GLOB", help_heading = "Many files")]
    exclude: Vec<String>,

    /// Output names, from {stem} {ext} {seed} {width} {height}
    #[arg(long, value_name = "TEMPLATE", help_heading = "Many files")]
    name: Option<Template>,

    /// Leave alone what an earlier run finished; anything not whole is done again
    #[arg(long, help_heading = "Many files", conflicts_with = "overwrite")]
    skip_existing: bool,

    /// Write over outputs that exist (the default)
    #[arg(long, help_heading = "Many files")]
    overwrite: bool,

    /// Pictures of one size to compute together, up to N; the pixels are the same
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64), help_heading = "Many files")]
    batch: u32,

    /// Do share I of N of the inputs, I from 0: to spread a folder over machines
    #[arg(long, value_name = "I/N", help_heading = "Many files")]
    shard: Option<Shard>,

    /// Say what would be done, and do nothing
    #[arg(long, help_heading = "Many files")]
    dry_run: bool,

    /// Output format where -o does not say: png, jpg, webp, tif, bmp, safetensors, latent
    #[arg(long, value_name = "EXT", help_heading = "Files")]
    format: Option<String>,

    /// JPEG (default 95) and WebP (default lossless) quality, 1 to 100
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=100), help_heading = "Files")]
    quality: Option<u8>,

    /// Write no metadata: neither the input's nor the settings used
    #[arg(long, help_heading = "Files")]
    strip: bool,

    /// Bring colours back to the input's: adain matches each channel's mean and spread, wavelet the low frequencies
    #[arg(long, value_enum, default_value_t = ColorFix::None, help_heading = "Files")]
    color_fix: ColorFix,

    /// The scale of latents read; auto follows the file's kind, else judges by the spread
    #[arg(long, value_enum, default_value_t = ScaleName::Auto, help_heading = "Files")]
    latent_scale: ScaleName,

    /// Also decode the input latents as they are, to NAME-low-res.EXT
    #[arg(long, help_heading = "Files")]
    save_low_res: bool,

    /// Refuse inputs of more pixels than this
    #[arg(long, value_name = "N", default_value_t = ReadLimits::default().max_pixels, help_heading = "Files")]
    max_pixels: u64,

    /// One JSON object a line on standard output per result
    #[arg(long)]
    json: bool,

    /// Errors only
    #[arg(short, long, conflicts_with = "verbose")]
    quiet: bool,

    /// Stage times, memory, files passed over
    #[arg(short, long)]
    verbose: bool,
}

const EXAMPLES: &str = "\
Examples:
  sd-upscale photo.png -p \"a red bicycle\" -o photo-2x.png
  sd-upscale photo.png --model tiny -o draft.png            no download
  sd-upscale -r shots/ -p \"film still\" -o big/ --skip-existing
  generator --latents | sd-upscale - -p \"an astronaut\" -o out.png

Environment: HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE=1, NO_COLOR, RAYON_NUM_THREADS
Exit status: 0 all done; 1 an input failed (the others were done); 2 usage; 130 interrupted";

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ScheduleName {
    Karras,
    LogLinear,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DtypeName {
    Auto,
    F32,
    F16,
    Bf16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ColorFix {
    None,
    Adain,
    Wavelet,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ScaleName {
    Auto,
    Scaled,
    Raw,
}

fn guidance(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err("expected a number of 0 or more".into()),
    }
}

/// How much is said on standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verbosity {
    Quiet,
    Normal,
    Verbose,
}

/// Everything a run needs to know.
pub struct Job {
    pub request: Request,
    /// Absent: each input's own, from its metadata.
    pub prompt: Option<String>,
    /// The prompt in it is replaced by each input's.
    pub settings: Settings,
    pub model: String,
    pub revision: String,
    pub vae: Option<String>,
    pub device: DeviceChoice,
    /// Absent: the device's default.
    pub dtype: Option<DType>,
    pub skip_existing: bool,
    pub batch: usize,
    pub dry_run: bool,
    pub quality: Option<u8>,
    pub strip: bool,
    pub color_fix: ColorFix,
    pub latent_scale: LatentScale,
    pub save_low_res: bool,
    pub limits: ReadLimits,
    pub json: bool,
    pub verbosity: Verbosity,
    /// Things to say once before the work.
    pub warnings: Vec<String>,
}

impl TryFrom<Args> for Job {
    type Error = UsageError;

    fn try_from(args: Args) -> Result<Self, UsageError> {
        let mut warnings = Vec::new();
        if args.negative_prompt.is_some() && args.guidance <= 1.0 {
            warnings.push(format!(
                "--negative-prompt has no effect at guidance {}: give -g a value above 1",
                args.guidance
            ));
        }
        if args.prompt.is_some() && args.guidance == 0.0 {
            warnings.push("guidance 0 ignores the prompt".into());
        }
        let output = args.output.map(Output::from);
        if args.json && output == Some(Output::Stdout) {
            return Err(UsageError(
                "--json and -o - both write to standard output: give -o a file".into(),
            ));
        }
        let revision = match (args.revision, &*args.model) {
            (Some(revision), _) => revision,
            (None, hub::DEFAULT_REPO) => hub::DEFAULT_REVISION.into(),
            (None, _) => "main".into(),
        };
        Ok(Job {
            request: Request {
                inputs: args.input.into_iter().map(Source::from).collect(),
                output,
                template: args.name,
                recursive: args.recursive,
                include: args.include,
                exclude: args.exclude,
                shard: args.shard,
                format: args.format,
                seed: args.seed,
            },
            settings: Settings {
                prompt: String::new(),
                negative_prompt: args.negative_prompt.unwrap_or_default(),
                steps: args.steps as usize,
                guidance: args.guidance,
                seed: args.seed,
                schedule: match args.schedule {
                    ScheduleName::Karras => Schedule::Karras,
                    ScheduleName::LogLinear => Schedule::LogLinear,
                },
            },
            prompt: args.prompt,
            model: args.model,
            revision,
            vae: args.vae,
            device: args.device,
            dtype: match args.dtype {
                DtypeName::Auto => None,
                DtypeName::F32 => Some(DType::F32),
                DtypeName::F16 => Some(DType::F16),
                DtypeName::Bf16 => Some(DType::BF16),
            },
            skip_existing: args.skip_existing,
            batch: args.batch as usize,
            dry_run: args.dry_run,
            quality: args.quality,
            strip: args.strip,
            color_fix: args.color_fix,
            latent_scale: match args.latent_scale {
                ScaleName::Auto => LatentScale::Auto,
                ScaleName::Scaled => LatentScale::Scaled,
                ScaleName::Raw => LatentScale::Raw,
            },
            save_low_res: args.save_low_res,
            limits: ReadLimits {
                max_pixels: args.max_pixels,
            },
            json: args.json,
            verbosity: match (args.quiet, args.verbose) {
                (true, _) => Verbosity::Quiet,
                (_, true) => Verbosity::Verbose,
                _ => Verbosity::Normal,
            },
            warnings,
        })
    }
}
