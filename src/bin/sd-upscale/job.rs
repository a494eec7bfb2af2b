//! The command line, checked once and turned into a [`Job`]; later code takes that, never the arguments.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use candle_core::DType;
use sd_upscale::device::{DeviceChoice, One};
use sd_upscale::latents::LatentScale;
use sd_upscale::limits::ReadLimits;
use sd_upscale::model::{self, TINY, hub};
use sd_upscale::pipeline::refined_steps;
use sd_upscale::plan::{Output, Prompt, Reads, Request, Source, UsageError, Variant};
use sd_upscale::{Memory, NoiseType, Sampler, Schedule, Settings};

use crate::args::{Args, ColorFix, DtypeName, NoiseTypeName, PromptFrom, ScaleName, ScheduleName};
use crate::embeds::Embeds;
use crate::prompts::Prompts;
use crate::size::Size;

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
    /// Absent: each input's own, from `prompts` or its metadata.
    pub prompt: Option<String>,
    /// Of pictures, from `--prompt-file`.
    pub prompts: Option<Prompts>,
    /// In place of all prompts, from `--prompt-embeds`.
    pub embeds: Option<Embeds>,
    /// Where an input's own is looked for.
    pub prompt_from: PromptFrom,
    /// The prompt, seed and guidance in it are replaced by each input's.
    pub settings: Settings,
    /// Whether pictures are made of prompts alone.
    pub generate: bool,
    /// The checkpoint that makes them, and refines.
    pub base: String,
    /// Of the pictures that it makes; absent: the checkpoint's own.
    pub base_size: Option<Size>,
    pub model: String,
    /// Of the original checkpoint, where everything but the UNet is; of other models nothing.
    pub model_parts: String,
    /// Of the repository that `model` or `model_parts` names.
    pub revision: String,
    pub vae: Option<String>,
    pub device: DeviceChoice,
    /// Absent: the device's default.
    pub dtype: Option<DType>,
    /// Whether a card may round float32 products to TF32.
    pub tf32: bool,
    /// What the work may take of it.
    pub memory: Memory,
    pub skip_existing: bool,
    /// Whether the run goes on with files that appear.
    pub watch: bool,
    pub batch: usize,
    pub dry_run: bool,
    pub quality: Option<u8>,
    pub strip: bool,
    pub color_fix: ColorFix,
    pub latent_scale: LatentScale,
    pub save_low_res: bool,
    pub preview: bool,
    pub compare: bool,
    /// Where all outputs of several seeds or guidances are shown.
    pub grid: Option<PathBuf>,
    pub limits: ReadLimits,
    pub json: bool,
    pub verbosity: Verbosity,
    /// What a configuration file says, in words.
    pub configuration: Option<String>,
    /// Things to say once before the work.
    pub warnings: Vec<String>,
}

impl Job {
    /// The model as files name it: without the folders that lead to it on this machine.
    pub fn model_name(&self) -> String {
        let name = Path::new(&self.model).file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// The base checkpoint likewise.
    pub fn base_name(&self) -> String {
        let name = Path::new(&self.base).file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// Whether the base checkpoint has something to do.
    pub fn uses_base(&self) -> bool {
        self.generate || self.settings.refine.is_some()
    }

    /// Whether it then has two passes, with a prompt to steer away from.
    pub fn is_base_guided(&self) -> bool {
        self.uses_base() && self.settings.base_guidance > 1.0
    }

    /// Whether there is something to steer away from a negative prompt: the upscaler, by these settings, or the base checkpoint.
    pub fn is_guided(&self, settings: &Settings) -> bool {
        settings.guidance > 1.0 || self.is_base_guided()
    }

    /// Whether its VAE has.
    pub fn uses_base_vae(&self) -> bool {
        (self.generate && (self.save_low_res || self.compare))
            || (self.settings.refine.is_some() && self.vae.is_none())
    }

    /// The run's settings by one of its seeds and guidances.
    pub fn settings_by(&self, variant: Variant) -> Settings {
        Settings {
            seed: variant.seed,
            guidance: variant.guidance,
            ..self.settings.clone()
        }
    }

    /// Whether standard output is where results or lines about them go.
    pub fn writes_to_stdout(&self) -> bool {
        self.json || self.request.output == Some(Output::Stdout)
    }
}

impl TryFrom<Args> for Job {
    type Error = UsageError;

    fn try_from(args: Args) -> Result<Self, UsageError> {
        let warnings = without_effect(&args);
        let (inputs, prompts) = inputs(&args)?;
        let embeds = embeds(&args)?;
        if args.watch {
            has_something_to_watch(&args)?;
        }
        let variants = variants(&args);
        let refine = args.refine.filter(|strength| *strength > 0.0);
        if let Some(strength) = refine {
            refines_something(strength, args.base_steps)?;
        }
        let revision = revision(&args);
        let output = args.output.map(Output::from);
        let to_stdout = output == Some(Output::Stdout);
        if args.json && to_stdout {
            return Err(UsageError(
                "--json and -o - both write to standard output: give -o a file".into(),
            ));
        }
        if output == Some(Output::Stdout) && std::io::stdout().is_terminal() {
            return Err(UsageError(
                "-o - would write the result's bytes to a terminal: give -o a file, or pipe them to a program".into(),
            ));
        }
        if args.dtype == DtypeName::Tf32 && on_the_cpu(&args.device) {
            return Err(UsageError(TF32_ON_THE_CPU.into()));
        }
        if let Some(folder) = &args.temp_dir {
            try_temp_dir(folder)?;
        }
        Ok(Job {
            request: Request {
                inputs,
                reads: if args.generate {
                    Reads::Prompts
                } else {
                    Reads::Pictures
                },
                listed: args.generate && args.prompt_file.is_some(),
                output,
                template: args.name,
                recursive: args.recursive,
                include: args.include,
                exclude: args.exclude,
                shard: args.shard,
                format: args.format,
                variants,
                times: args.scale.times(),
            },
            settings: Settings {
                prompt: String::new(),
                negative_prompt: args.negative_prompt.unwrap_or_default(),
                prompt_embeds: embeds.as_ref().map(|embeds| embeds.first().clone()),
                scale: args.scale,
                steps: args.steps as usize,
                schedule: match args.schedule {
                    ScheduleName::Karras => Schedule::Karras,
                    ScheduleName::LogLinear => Schedule::LogLinear,
                },
                sampler: args.sampler,
                eta: args.eta,
                tolerance: args.tolerance,
                noise_level: args.noise_level,
                noise_type: match args.noise_type {
                    None | Some(NoiseTypeName::Gaussian) => NoiseType::Gaussian,
                    Some(NoiseTypeName::Fake) => NoiseType::Fake,
                },
                mask_padding: args.mask_padding,
                base_steps: args.base_steps as usize,
                base_guidance: args.base_guidance,
                refine,
                ..Settings::default()
            },
            prompt: args.prompt,
            prompts,
            embeds,
            prompt_from: args.prompt_from,
            generate: args.generate,
            base: args.base,
            base_size: args.size,
            model: args.model,
            model_parts: args.model_parts.unwrap_or(hub::DEFAULT_REPO.into()),
            revision,
            vae: args.vae,
            device: args.device,
            dtype: match args.dtype {
                DtypeName::Auto => None,
                DtypeName::F32 | DtypeName::Tf32 => Some(DType::F32),
                DtypeName::F16 => Some(DType::F16),
                DtypeName::Bf16 => Some(DType::BF16),
            },
            tf32: args.dtype == DtypeName::Tf32,
            memory: Memory {
                most: args.max_memory,
                temp_dir: args.temp_dir,
            },
            skip_existing: args.skip_existing,
            watch: args.watch,
            batch: if args.sampler.takes_steps() {
                args.batch as usize
            } else {
                1
            },
            dry_run: args.dry_run,
            quality: args.quality,
            strip: args.strip,
            color_fix: args.color_fix,
            latent_scale: match args.latent_scale {
                ScaleName::Auto => LatentScale::Auto,
                ScaleName::Scaled => LatentScale::Scaled,
                ScaleName::Raw => LatentScale::Raw,
            },
            save_low_res: args.save_low_res && !to_stdout,
            // There is nothing beside standard output, which is said.
            preview: args.preview && !to_stdout,
            compare: args.compare && !to_stdout,
            grid: args.grid,
            limits: ReadLimits {
                max_pixels: args.max_pixels,
            },
            json: args.json,
            verbosity: match (args.quiet, args.verbose) {
                (true, _) => Verbosity::Quiet,
                (_, true) => Verbosity::Verbose,
                _ => Verbosity::Normal,
            },
            configuration: args.configuration,
            warnings,
        })
    }
}

/// What the run is of, and the prompts that go with it where these are files.
fn inputs(args: &Args) -> Result<(Vec<Source>, Option<Prompts>), UsageError> {
    if !args.generate {
        let inputs = args.input.iter().cloned().map(Source::from).collect();
        let file = args.prompt_file.as_deref();
        return Ok((inputs, file.map(Prompts::read).transpose()?));
    }
    match (&args.prompt, &args.prompt_file) {
        (Some(prompt), _) => {
            let prompt = Prompt {
                name: "the prompt".into(),
                relative: "prompt".into(),
                text: prompt.clone(),
            };
            Ok((vec![Source::Prompt(prompt)], None))
        }
        (None, Some(folder)) if folder.is_dir() => Ok((vec![Source::Path(folder.clone())], None)),
        (None, Some(file)) => Ok((Prompts::read(file)?.sources()?, None)),
        (None, None) => Err(UsageError(
            "--generate makes pictures of prompts: give -p TEXT, or --prompt-file FILE".into(),
        )),
    }
}

/// # Errors
/// No folder is watched, or prompts are counted before the files are there.
fn has_something_to_watch(args: &Args) -> Result<(), UsageError> {
    let wrong = |what: &str| Err(UsageError(format!("--watch {what}")));
    if args.generate {
        let folder = args.prompt_file.as_deref();
        if folder.is_some_and(Path::is_dir) {
            return Ok(());
        }
        return wrong("goes on with files of a folder: give --prompt-file a folder of .txt files");
    }
    if !args.input.iter().any(|input| Path::new(input).is_dir()) {
        return wrong("goes on with files of a folder, and no input is one");
    }
    if args.prompt_file.is_some() {
        return wrong(
            "takes no --prompt-file, which is of files that are there: give -p, or --prompt-from sidecar",
        );
    }
    Ok(())
}

/// # Errors
/// Their file cannot be followed, or there are two prompts to steer away from.
fn embeds(args: &Args) -> Result<Option<Embeds>, UsageError> {
    let Some(file) = &args.prompt_embeds else {
        return Ok(None);
    };
    let embeds = Embeds::read(file)?;
    if args.negative_prompt.is_some() && embeds.first().has_negative() {
        return Err(UsageError(format!(
            "--prompt-embeds {} has negative_prompt_embeds, and --negative-prompt was given as well: leave that out",
            file.display()
        )));
    }
    Ok(Some(embeds))
}

/// What every input is done by: each seed with each guidance.
fn variants(args: &Args) -> Vec<Variant> {
    let of_seed = |&seed: &u64| {
        let with = move |&guidance: &f64| Variant { seed, guidance };
        args.guidance.0.iter().map(with).collect::<Vec<_>>()
    };
    args.seed.0.iter().flat_map(of_seed).collect()
}

/// # Errors
/// The strength leaves no step to do, as the base checkpoint would say later.
fn refines_something(strength: f64, steps: u32) -> Result<(), UsageError> {
    if refined_steps(steps as usize, strength) > 0 {
        return Ok(());
    }
    Err(UsageError(format!(
        "--refine {strength} of {steps} base steps leaves no step to do: give a strength of {} or more, or more --base-steps",
        1.0 / f64::from(steps)
    )))
}

/// Whether files can be made in the folder of `--temp-dir`: better now than after the first of the work.
fn try_temp_dir(folder: &Path) -> Result<(), UsageError> {
    let wrong = |what: String| {
        let folder = folder.display();
        UsageError(format!(
            "--temp-dir {folder}: {what}; expected a folder that can be written to"
        ))
    };
    if !folder.is_dir() {
        let what = if folder.exists() {
            "it is not a folder"
        } else {
            "there is no such folder"
        };
        return Err(wrong(what.into()));
    }
    let tried = tempfile::tempfile_in(folder);
    tried.map_err(|error| wrong(format!("no file can be made in it ({error})")))?;
    Ok(())
}

/// What is wrong with it.
pub const TF32_ON_THE_CPU: &str = "--dtype tf32 is of CUDA cards' tensor cores, and the CPU would do the work: use --dtype f32, or --device cuda";

/// Whether the CPU is among the devices that were asked for, or is all that this build has.
fn on_the_cpu(choice: &DeviceChoice) -> bool {
    match choice {
        DeviceChoice::List(names) => names.contains(&One::Cpu),
        DeviceChoice::Auto | DeviceChoice::AllCuda => !cfg!(feature = "cuda"),
    }
}

/// What names the run's repository, where there is one: the model, or of the original checkpoint what goes with it.
fn repository(args: &Args) -> &str {
    if model::is_checkpoint(&args.model) {
        args.model_parts.as_deref().unwrap_or(hub::DEFAULT_REPO)
    } else {
        &args.model
    }
}

fn revision(args: &Args) -> String {
    match (&args.revision, repository(args)) {
        (Some(revision), _) => revision.clone(),
        (None, hub::DEFAULT_REPO) => hub::DEFAULT_REVISION.into(),
        (None, _) => "main".into(),
    }
}

/// Options that do nothing in this command, one sentence each.
fn without_effect(args: &Args) -> Vec<String> {
    let guidances = &args.guidance.0;
    let uses_base = args.generate || args.refine.is_some_and(|strength| strength > 0.0);
    let base_guided = uses_base && args.base_guidance > 1.0;
    let shown: Vec<String> = guidances.iter().map(f64::to_string).collect();
    let negative = format!(
        "--negative-prompt has no effect at guidance {}: give -g a value above 1",
        shown.join(",")
    );
    let given = args.prompt.is_some() || args.prompt_file.is_some() || args.prompt_embeds.is_some();
    let of_prompts = [
        (
            args.negative_prompt.is_some()
                && guidances.iter().all(|guidance| *guidance <= 1.0)
                && !base_guided,
            &*negative,
        ),
        (
            given && guidances.iter().all(|guidance| *guidance == 0.0) && !uses_base,
            "guidance 0 ignores the prompt",
        ),
    ];
    let built_in = args.model == TINY;
    let original = model::is_checkpoint(&args.model);
    let repository = repository(args);
    let is_dir = |path: &Path| path.is_dir();
    let folders = args.input.iter().any(|input| is_dir(Path::new(input)))
        || (args.generate && args.prompt_file.as_deref().is_some_and(is_dir));
    let to_stdout = args.output.as_ref().is_some_and(|output| output == "-");
    let others = [
        (
            built_in
                && !uses_base
                && (given
                    || args.negative_prompt.is_some()
                    || guidances.iter().any(|guidance| *guidance > 1.0)),
            "the prompt and the guidance do nothing in the built-in model: it was trained without words",
        ),
        (
            args.gives("prompt_from") && (given || args.generate),
            "--prompt-from has no effect: it says where a prompt comes from when none is given",
        ),
        (
            args.noise_type.is_some() && args.noise_level == 0.0,
            "--noise-type has no effect at noise level 0: give --noise-level a value above 0",
        ),
        (
            built_in && args.mask_padding,
            "--mask-padding does nothing in the built-in model: it was trained without words",
        ),
        (
            args.revision.is_some() && (repository == TINY || Path::new(repository).exists()),
            "--revision has no effect: it is of a Hub repository, and --model names none",
        ),
        (
            args.model_parts.is_some() && !original,
            "--model-parts has no effect: it goes with the original checkpoint, and --model names no file",
        ),
        (
            !folders && (args.recursive || !args.include.is_empty() || !args.exclude.is_empty()),
            "--recursive, --include and --exclude have no effect: they choose within folders, and no input is one",
        ),
        (
            to_stdout
                && (args.skip_existing
                    || args.save_low_res
                    || args.preview
                    || args.compare
                    || args.name.is_some()),
            "--skip-existing, --save-low-res, --preview, --compare and --name have no effect with -o -",
        ),
    ];
    let of_base = [
        (
            !uses_base && args.gives("base"),
            "--base has no effect: it is for --generate and --refine",
        ),
        (
            !uses_base && args.gives("base_steps"),
            "--base-steps has no effect: it is for --generate and --refine",
        ),
        (
            !uses_base && args.gives("base_guidance"),
            "--base-guidance has no effect: it is for --generate and --refine",
        ),
        (
            args.size.is_some() && !args.generate,
            "--size has no effect: it is of the pictures that --generate makes",
        ),
        (
            args.refine == Some(0.0),
            "--refine 0 changes nothing: give a strength above 0",
        ),
        (
            args.generate && args.batch > 1,
            "--batch has no effect with --generate: every picture has a prompt or a seed of its own",
        ),
        (
            args.generate && args.color_fix != ColorFix::None,
            "--color-fix has no effect with --generate: there is no picture to take the colours from",
        ),
        (
            args.generate && args.gives("latent_scale"),
            "--latent-scale has no effect with --generate: no latents are read",
        ),
        (
            args.generate && args.gives("max_pixels"),
            "--max-pixels has no effect with --generate: it is of inputs",
        ),
    ];
    let said = |rows: &[(bool, &str)]| -> Vec<String> {
        let applying = rows.iter().filter(|(applies, _)| *applies);
        applying.map(|(_, text)| (*text).to_owned()).collect()
    };
    [
        said(&of_prompts),
        without_effect_on_the_sampler(args),
        said(&others),
        said(&of_base),
    ]
    .concat()
}

/// What is said of how to sample and does nothing in the sampler.
fn without_effect_on_the_sampler(args: &Args) -> Vec<String> {
    let sampler = args.sampler;
    let names = |takes: fn(Sampler) -> bool| {
        let all = Sampler::ALL.into_iter().filter(|one| takes(*one));
        all.map(Sampler::name).collect::<Vec<_>>().join(", ")
    };
    [
        (
            args.gives("schedule") && !sampler.takes_a_schedule(),
            "--schedule",
            "it takes the ends of the noise levels alone".into(),
        ),
        (
            args.gives("steps") && !sampler.takes_steps(),
            "--steps",
            "it takes as many as --tolerance asks for".into(),
        ),
        (
            args.batch > 1 && !sampler.takes_steps(),
            "--batch",
            "the steps of each picture are its own".into(),
        ),
        (
            args.gives("eta") && !sampler.takes_eta(),
            "--eta",
            format!(
                "it adds no noise as it goes; these do: {}",
                names(Sampler::takes_eta)
            ),
        ),
        (
            args.gives("tolerance") && !sampler.takes_a_tolerance(),
            "--tolerance",
            format!("it is of {}", names(Sampler::takes_a_tolerance)),
        ),
    ]
    .into_iter()
    .filter(|(applies, ..)| *applies)
    .map(|(_, option, why)| format!("{option} has no effect with --sampler {sampler}: {why}"))
    .collect()
}
