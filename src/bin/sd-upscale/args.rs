//! The command line: what can be said.

use std::ffi::OsString;
use std::num::ParseIntError;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use anyhow::Result;
use clap::builder::{NonEmptyStringValueParser, PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{
    Arg, ArgAction, ArgMatches, Command, CommandFactory, Error, FromArgMatches, Id, Parser,
    ValueEnum, ValueHint,
};
use sd_upscale::device::DeviceChoice;
use sd_upscale::limits::ReadLimits;
use sd_upscale::model::hub;
use sd_upscale::pipeline::{MAX_GUIDANCE, MAX_NOISE_LEVEL, MAX_TOLERANCE, MIN_TOLERANCE};
use sd_upscale::plan::{Shard, Template, UsageError};
use sd_upscale::{Enlargement, Sampler, Settings};

use crate::completions::Shell;
use crate::completions::values::{self, values_of};
use crate::configuration::Configuration;
use crate::size::Size;
use crate::{memory_size, notes, version};

/// Upscale images and latents by the Stable Diffusion x2 latent upscaler
#[derive(Parser, Debug)]
#[command(version, max_term_width = 80, args_override_self = true)]
pub struct Args {
    /// Image, latents file, folder, or - for standard input
    ///
    /// Latents are .safetensors, .latent and .npz.
    #[arg(required_unless_present_any = WITHOUT_INPUT, value_hint = ValueHint::AnyPath)]
    pub input: Vec<OsString>,

    /// File, folder, or - for standard output
    ///
    /// A file for one input, a folder for several or for a folder. The extension picks the format: png, jpg, webp, tif, bmp, jxl; .safetensors and .latent write the upscaled
    /// latents and decode nothing. Without it, the result goes beside the input as NAME-2x.EXT (of --scale 4,
    /// NAME-4x.EXT).
    #[arg(short, long, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    pub output: Option<OsString>,

    /// What the image shows [default: as its metadata say]
    ///
    /// The prompt in the input's metadata, where there is one, else none.
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,

    /// What to steer away from; needs a guidance above 1
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub negative_prompt: Option<String>,

    /// Prompts from a file, a line each: FILE NAME<tab>PROMPT, or in the order of the inputs; - for standard input
    ///
    /// With --generate each line is a picture, called FILE NAME or else by its line's number; or a folder, of whose .txt files each
    /// is one.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub prompt_file: Option<PathBuf>,

    /// A prompt as the text encoder's numbers: safetensors with prompt_embeds (b, 77, 768) and pooled_prompt_embeds (b, 768)
    ///
    /// As diffusers' pipeline of this model takes them, with negative_prompt_embeds and negative_pooled_prompt_embeds where the file has
    /// them. One row for all inputs, or a row an input (or, of one file of several latents, a row for each of these).
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with_all = ["prompt", "prompt_file", "generate", "refine", "mask_padding"])]
    pub prompt_embeds: Option<PathBuf>,

    /// Where an input's prompt comes from when neither -p nor --prompt-file gives one: its metadata, or NAME.txt beside it
    #[arg(long, value_enum, default_value_t = PromptFrom::Metadata)]
    pub prompt_from: PromptFrom,

    /// How many times as large the result is
    ///
    /// 4 and 8 repeat the upscaler on its own latents.
    #[arg(long, value_name = "2|4|8", default_value_t)]
    pub scale: Enlargement,

    /// Denoising steps, 1 to 1000
    ///
    /// Of each pass at --scale 4 and 8.
    #[arg(short, long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub steps: u32,

    /// How much the prompt counts; 0: not at all
    ///
    /// 0: ignore the prompt; above 0 up to 1: one pass; above 1: classifier-free guidance, two passes. Several, such as 0,1,4: an
    /// output each.
    #[arg(short, long, value_name = "G", default_value = "1", value_parser = several(guidance), allow_negative_numbers = true)]
    pub guidance: Several<f64>,

    /// Noise seed, or several: 1,2,3
    ///
    /// Several: an output each. The noise of PyTorch's CPU generator; every input starts from the same.
    #[arg(long, value_name = "N", default_value = "0", value_parser = several(seed), allow_negative_numbers = true)]
    pub seed: Several<u64>,

    /// Folder, Hub repository, FILE.pth, or tiny (built in)
    ///
    /// A folder in the diffusers layout, a repository of the Hub, the original checkpoint, or the small built-in model.
    #[arg(long, value_name = "MODEL", default_value = hub::DEFAULT_REPO, add = values_of(values::models))]
    pub model: String,

    /// auto, cpu, cuda, cuda:N, or several
    ///
    /// Several: a list such as cuda:0,cuda:1, or cuda:all.
    #[arg(long, value_name = "DEVICE", default_value = "auto", add = values_of(values::devices))]
    pub device: DeviceChoice,

    /// Noise schedule; log-linear is what the published pipeline runs
    #[arg(long, value_enum, default_value_t = ScheduleName::Karras)]
    pub schedule: ScheduleName,

    /// The way from noise to the result
    ///
    /// euler, euler-ancestral, dpmpp-2m and dpm-fast evaluate the UNet once a step; heun, dpm2, dpm2-ancestral and dpmpp-2s-ancestral
    /// twice, which takes twice as long. dpm-fast spaces its steps itself, without --schedule; dpm-adaptive takes as many as
    /// --tolerance asks for, without --steps. The ancestral ones, dpm-fast and dpm-adaptive add noise as they go, as much as --eta says.
    #[arg(long, value_name = "NAME", default_value_t, value_parser = sampler())]
    pub sampler: Sampler,

    /// Of samplers that add noise as they go: how much of it, 0 to 1
    #[arg(long, value_name = "X", default_value_t = Settings::default().eta, value_parser = eta, allow_negative_numbers = true)]
    pub eta: f64,

    /// Of dpm-adaptive: the error allowed in a step; less is closer and takes longer
    #[arg(long, value_name = "X", default_value_t = Settings::default().tolerance, value_parser = tolerance, allow_negative_numbers = true)]
    pub tolerance: f64,

    /// Take the input to have noise of this spread, 0 to 0.6: the result keeps less to it, and more of what is wrong with it goes
    ///
    /// The original's noise augmentation. It may help with inputs unlike those that the model knows; mostly it makes results match
    /// them less. It needs the original checkpoint, or a folder that --convert made of it.
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = noise_level, allow_negative_numbers = true)]
    pub noise_level: f64,

    /// gaussian: noise of the level is added, from which new detail grows; fake: none is, and the picture stays smoother [default: gaussian]
    #[arg(long, value_enum)]
    pub noise_type: Option<NoiseTypeName>,

    /// Let the picture see a prompt's words alone, as the model was trained: without the padding behind them a short prompt weighs more
    #[arg(long)]
    pub mask_padding: bool,

    /// Take no input: make a picture's latents from the prompt first, by a Stable Diffusion checkpoint, and upscale these
    #[arg(long, conflicts_with = "input", help_heading = "From words")]
    pub generate: bool,

    /// The checkpoint for --generate and --refine, Stable Diffusion 1.x or 2.x: diffusers layout, or its single file
    #[arg(long, value_name = "DIR|REPO|FILE", default_value = hub::DEFAULT_BASE, add = values_of(values::bases), help_heading = "From words")]
    pub base: String,

    /// Steps of that checkpoint, by the sampler that it names
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1000), help_heading = "From words")]
    pub base_steps: u32,

    /// Its own guidance: above 1 in two passes, up to 1 the prompt alone
    #[arg(long, value_name = "G", default_value_t = 7.5, value_parser = guidance, allow_negative_numbers = true, help_heading = "From words")]
    pub base_guidance: f64,

    /// Size of the picture that it makes, in pixels, before it is upscaled: multiples of 8 [default: the checkpoint's]
    #[arg(long, value_name = "WxH", value_parser = size, help_heading = "From words")]
    pub size: Option<Size>,

    /// After upscaling, let that checkpoint do this share of its steps again, 0 to 1: below 0.3 it repairs artefacts
    ///
    /// Of any input. The result is decoded by --vae, else by the checkpoint's own VAE.
    #[arg(long, value_name = "X", value_parser = strength, allow_negative_numbers = true, help_heading = "From words")]
    pub refine: Option<f64>,

    /// What goes with the original checkpoint: text encoder, tokenizer, VAE [default: those of the usual repository]
    #[arg(long, value_name = "DIR|REPO", add = values_of(values::models), help_heading = "Model")]
    pub model_parts: Option<String>,

    /// Branch, tag or commit of the model's repository, or of its parts' [default: a pinned commit]
    #[arg(long, value_name = "REV", help_heading = "Model")]
    pub revision: Option<String>,

    /// Another Stable Diffusion VAE, e.g. stabilityai/sd-vae-ft-mse, or madebyollin/taesd for drafts [default: the model's own]
    #[arg(long, value_name = "DIR|FILE|REPO", add = values_of(values::vaes), help_heading = "Model")]
    pub vae: Option<String>,

    /// Compute every layer and the built-in model on a device, compare with the CPU, and end; 1 where one is wrong
    #[arg(
        long,
        value_name = "DEVICE",
        num_args = 0..=1,
        default_missing_value = "auto",
        add = values_of(values::devices),
        help_heading = "Model"
    )]
    pub check_device: Option<DeviceChoice>,

    /// Show the devices with their memory, and why there is no CUDA where there is none, and end; with --json a line each
    #[arg(long, help_heading = "Model")]
    pub list_devices: bool,

    /// Precision; auto: f16 on CUDA, f32 on the CPU; f16 and bf16: half the memory;
    /// tf32: f32 whose products CUDA's tensor cores may round
    #[arg(long, value_enum, default_value_t = DtypeName::Auto, help_heading = "Model")]
    pub dtype: DtypeName,

    /// CPU threads, no more than the processors lent [default: RAYON_NUM_THREADS, or as many as these]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Model")]
    pub threads: Option<u16>,

    /// The most memory to take, such as 8GB or 600MiB; the picture stays the same [default: what is free]
    #[arg(long, value_name = "SIZE", value_parser = memory_size::parse, help_heading = "Model")]
    pub max_memory: Option<u64>,

    /// Where maps that do not fit in memory go [default: the system's]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "Model")]
    pub temp_dir: Option<PathBuf>,

    /// Write the model to a new folder in the diffusers layout, in --dtype where that is given, else as it is stored, and end
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath, help_heading = "Model")]
    pub convert: Option<PathBuf>,

    /// Write the built-in model to a folder in the diffusers layout, and end
    #[arg(
        long,
        value_name = "DIR",
        value_hint = ValueHint::DirPath,
        help_heading = "Model",
        conflicts_with = "input"
    )]
    pub export_tiny: Option<PathBuf>,

    /// Read folders within folders
    ///
    /// The output folder gets the same tree.
    #[arg(short, long, help_heading = "Many files")]
    pub recursive: bool,

    /// Of what folders hold, only files that match (repeatable)
    #[arg(long, value_name = "GLOB", help_heading = "Many files")]
    pub include: Vec<String>,

    /// Of what folders hold, no files that match (repeatable)
    #[arg(long, value_name = "GLOB", help_heading = "Many files")]
    pub exclude: Vec<String>,

    /// Output names, from {stem} {ext} {in_ext} (the input's) {seed} {guidance} {width} {height}
    #[arg(long, value_name = "TEMPLATE", help_heading = "Many files")]
    pub name: Option<Template>,

    /// Leave alone what an earlier run finished
    ///
    /// Anything not whole is done again.
    #[arg(long, help_heading = "Many files", conflicts_with = "overwrite")]
    pub skip_existing: bool,

    /// Write over outputs that exist (the default)
    #[arg(long, help_heading = "Many files")]
    pub overwrite: bool,

    /// Pictures of one size to compute together, up to N; the pixels are the same
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64), help_heading = "Many files")]
    pub batch: u32,

    /// Go on with files that appear in the input folders, once they are whole, until interrupted
    ///
    /// The model stays in memory. A file that is written again is done again.
    #[arg(long, help_heading = "Many files", conflicts_with_all = ["dry_run", "grid"])]
    pub watch: bool,

    /// Do share I of N of the inputs, I from 0: to spread a folder over machines
    #[arg(long, value_name = "I/N", help_heading = "Many files")]
    pub shard: Option<Shard>,

    /// Say what would be done, and do nothing
    #[arg(long, help_heading = "Many files")]
    pub dry_run: bool,

    /// Output format where -o does not say: png, jpg, webp, tif, bmp, jxl, safetensors, latent
    #[arg(long, value_name = "EXT", add = values_of(values::formats), help_heading = "Files")]
    pub format: Option<String>,

    /// JPEG (default 95) and WebP (default lossless) quality, 1 to 100
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=100), help_heading = "Files")]
    pub quality: Option<u8>,

    /// Write no metadata: neither the input's nor the settings used; the colour profile stays, as colours depend on it
    #[arg(long, help_heading = "Files")]
    pub strip: bool,

    /// Bring colours back to the input's: adain matches each channel's mean and spread, wavelet the low frequencies
    #[arg(long, value_enum, default_value_t = ColorFix::None, help_heading = "Files")]
    pub color_fix: ColorFix,

    /// The scale of latents read; auto follows the file's kind, else judges by the spread
    #[arg(long, value_enum, default_value_t = ScaleName::Auto, help_heading = "Files")]
    pub latent_scale: ScaleName,

    /// Also decode the latents before upscaling, to NAME-low-res.EXT; where latents are written, these to NAME-low-res.safetensors too
    #[arg(long, help_heading = "Files")]
    pub save_low_res: bool,

    /// Also write NAME-compare.EXT: the input enlarged by Lanczos beside the result
    #[arg(long, help_heading = "Files")]
    pub compare: bool,

    /// Also write the outputs of several seeds or guidances into one picture, each under a label
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Files")]
    pub grid: Option<PathBuf>,

    /// Show the steps so far in NAME-preview.EXT, replaced as they pass, removed at the end
    ///
    /// By the decoder where --vae is an AutoencoderTiny, at the result's size; else by a linear map of the latents, a pixel a
    /// latent position, an eighth of the result's size. PNG where latents are written. A file that is there is left alone.
    #[arg(long, help_heading = "Files")]
    pub preview: bool,

    /// Refuse inputs of more pixels than this
    #[arg(long, value_name = "N", default_value_t = ReadLimits::default().max_pixels, help_heading = "Files")]
    pub max_pixels: u64,

    /// One JSON object a line on standard output per result
    #[arg(long)]
    pub json: bool,

    /// Errors only
    #[arg(short, long, conflicts_with = "verbose")]
    pub quiet: bool,

    /// Stage times, memory, files passed over
    #[arg(short, long)]
    pub verbose: bool,

    /// Print what completes this command line in a shell, and end
    #[arg(
        long,
        value_name = "SHELL",
        value_enum,
        help_heading = "About the program"
    )]
    pub completions: Option<Shell>,

    /// Print the man page, and end
    #[arg(long, help_heading = "About the program")]
    pub man: bool,

    /// Which of these were given, not taken by default.
    #[arg(skip)]
    given: Vec<Id>,

    /// What a configuration file says, in words.
    #[arg(skip)]
    pub configuration: Option<String>,
}

impl Args {
    /// What the process was given; a command line that cannot be read ends it, with clap's message and status 2.
    /// What a configuration file says counts where the command line says nothing else.
    ///
    /// # Errors
    /// The configuration file cannot be followed.
    pub fn of_process() -> Result<Self> {
        let command = Self::checked_command();
        let matches = command.clone().try_get_matches();
        let lacks = |error: &Error| error.kind() == ErrorKind::MissingRequiredArgument;
        let given = match &matches {
            Ok(matches) => given(matches),
            // The file may say what is missing.
            Err(error) if lacks(error) => {
                let lenient = command.clone().ignore_errors(true);
                given(&lenient.try_get_matches().unwrap_or_default())
            }
            Err(error) => error.exit(),
        };
        let found = Configuration::find(&command)?;
        let (matches, configuration) = match found {
            None => (matches.unwrap_or_else(|error| error.exit()), None),
            Some(found) => {
                let found = found.under(&command, &given);
                let mut words = std::env::args_os();
                let program = words.next();
                let all = program.into_iter().chain(found.arguments()).chain(words);
                let matches = command.try_get_matches_from(all).map_err(|error| {
                    // Without the usage that follows, which is not the matter.
                    let text = error.to_string();
                    let line = text.lines().next().unwrap_or_default();
                    let what = line.strip_prefix("error: ").unwrap_or(line);
                    UsageError(format!("{what} (with the defaults of {})", found.name()))
                })?;
                (matches, Some(found.in_words()))
            }
        };
        let args = Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
        Ok(Self {
            given,
            configuration,
            ..args
        })
    }

    /// Whether an option of this name was given, be it its default.
    pub fn gives(&self, option: &str) -> bool {
        self.given.iter().any(|id| id == option)
    }

    /// The command, as it is read, helped with and completed.
    pub fn checked_command() -> Command {
        let command = modes(Self::command())
            .mut_args(|argument| {
                let shown = ON_ONE_SCREEN.contains(&argument.get_id().as_str());
                argument.hide_short_help(!shown)
            })
            .disable_help_flag(true)
            .disable_version_flag(true);
        command
            .arg(help_flag())
            .arg(version_flag())
            .long_version(version::in_full())
            .after_long_help(notes::of_help())
    }
}

/// What works without one.
const WITHOUT_INPUT: [&str; 7] = [
    "export_tiny",
    "check_device",
    "list_devices",
    "completions",
    "man",
    "convert",
    "generate",
];

/// What `-h` shows: the ten options that people use.
const ON_ONE_SCREEN: [&str; 11] = [
    "input",
    "output",
    "prompt",
    "scale",
    "steps",
    "guidance",
    "seed",
    "model",
    "device",
    "recursive",
    "skip_existing",
];

fn help_flag() -> Arg {
    Arg::new("help")
        .short('h')
        .long("help")
        .action(ArgAction::Help)
        .help("This page; --help has all options, with examples")
        .long_help("All options; -h shows the ten that people use")
}

fn version_flag() -> Arg {
    Arg::new("version")
        .short('V')
        .long("version")
        .action(ArgAction::Version)
        .hide_short_help(true)
        .help_heading("About the program")
        .help("The version, and with --version the commit, features and CPU kernels")
}

/// The command, whose modes take no option of a run: whatever is not about what they do.
fn modes(command: Command) -> Command {
    let command = alone(command, "check_device", &["json", "verbose"]);
    let command = alone(command, "list_devices", &["json"]);
    let command = alone(command, "completions", &[]);
    let command = alone(command, "man", &[]);
    let of_a_model = [
        "model",
        "model_parts",
        "revision",
        "dtype",
        "quiet",
        "verbose",
    ];
    alone(command, "convert", &of_a_model)
}

/// The command with an option that no other goes with but those of `company`.
fn alone(command: Command, option: &'static str, company: &[&str]) -> Command {
    let others: Vec<Id> = command
        .get_arguments()
        .map(|argument| argument.get_id().clone())
        .filter(|id| id != option && !company.contains(&id.as_str()))
        .collect();
    command.mut_arg(option, |argument| argument.conflicts_with_all(others))
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ScheduleName {
    Karras,
    LogLinear,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum NoiseTypeName {
    Gaussian,
    Fake,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PromptFrom {
    Metadata,
    Sidecar,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DtypeName {
    Auto,
    F32,
    Tf32,
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
pub enum ScaleName {
    Auto,
    Scaled,
    Raw,
}

fn given(matches: &ArgMatches) -> Vec<Id> {
    let from = |id: &Id| matches.value_source(id.as_str());
    let ids = matches.ids().cloned();
    ids.filter(|id| from(id) == Some(ValueSource::CommandLine))
        .collect()
}

/// One or more values of a setting, in their order.
#[derive(Clone, Debug, PartialEq)]
pub struct Several<T>(pub Vec<T>);

/// Values with commas between them, each once, by the parser of one.
fn several<T: PartialEq + Clone + Send + Sync + 'static>(
    one: fn(&str) -> Result<T, String>,
) -> impl TypedValueParser<Value = Several<T>> {
    NonEmptyStringValueParser::new().try_map(move |text| {
        let mut values = Vec::new();
        for part in text.split(',') {
            let value = one(part.trim())?;
            if !values.contains(&value) {
                values.push(value);
            }
        }
        Ok::<_, String>(Several(values))
    })
}

fn seed(text: &str) -> Result<u64, String> {
    let wrong = |error| format!("{error}; expected a whole number from 0 to {}", u64::MAX);
    text.parse().map_err(|error: ParseIntError| wrong(error))
}

fn strength(text: &str) -> Result<f64, String> {
    number(text, 0.0..=1.0, || {
        "expected a number from 0, nothing, to 1, all steps".into()
    })
}

/// `512x768`, in pixels that latents can stand for.
fn size(text: &str) -> Result<Size, String> {
    const MULTIPLE: usize = 8;
    let sides = text.split_once(['x', 'X', '×']);
    let sides = sides.and_then(|(w, h)| Some((w.trim().parse().ok()?, h.trim().parse().ok()?)));
    let Some((width, height)) = sides else {
        return Err("expected a width and a height in pixels, such as 512x768".into());
    };
    let near = |side: usize| (side.saturating_add(MULTIPLE / 2) / MULTIPLE).max(1) * MULTIPLE;
    if width != near(width) || height != near(height) {
        let (width, height) = (near(width), near(height));
        return Err(format!(
            "sides must be multiples of {MULTIPLE}: {width}x{height} is near"
        ));
    }
    Ok(Size { width, height })
}

fn sampler() -> impl TypedValueParser<Value = Sampler> {
    PossibleValuesParser::new(Sampler::ALL.map(Sampler::name))
        .try_map(|name| name.parse::<Sampler>())
}

fn eta(text: &str) -> Result<f64, String> {
    number(text, 0.0..=1.0, || {
        "expected a number from 0, no noise, to 1, all of it".into()
    })
}

fn tolerance(text: &str) -> Result<f64, String> {
    number(text, MIN_TOLERANCE..=MAX_TOLERANCE, || {
        format!("expected a number above 0, from {MIN_TOLERANCE} to {MAX_TOLERANCE}")
    })
}

fn noise_level(text: &str) -> Result<f64, String> {
    number(text, 0.0..=MAX_NOISE_LEVEL, || {
        format!("expected a number from 0 to {MAX_NOISE_LEVEL}")
    })
}

fn guidance(text: &str) -> Result<f64, String> {
    number(text, 0.0..=MAX_GUIDANCE, || {
        format!(
            "expected a number of 0 or more, up to {MAX_GUIDANCE}; above 20 or so pictures burn out"
        )
    })
}

/// A number of a range; what was expected, where it is none.
fn number(
    text: &str,
    range: RangeInclusive<f64>,
    expected: impl Fn() -> String,
) -> Result<f64, String> {
    let value = text.parse().ok();
    value
        .filter(|value| range.contains(value))
        .ok_or_else(expected)
}
