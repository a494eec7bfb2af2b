//! A folder's images upscaled 2x with the built-in model, with progress; a file that fails does not stop the others:
//!
//! ```text
//! cargo run --release --example folder -- shots/ big/
//! ```

use std::path::Path;

use anyhow::{Context, Result, ensure};
use sd_upscale::limits::ReadLimits;
use sd_upscale::picture::{self, Format, Picture};
use sd_upscale::plan::{self, Output, Request, Source, Task};
use sd_upscale::{Event, LowRes, ModelFiles, Options, Settings, Upscaler, files};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let input = args.next().context("give a folder and an output folder")?;
    let output = args.next().context("give an output folder")?;
    let failed = upscale(input.as_ref(), output.as_ref(), |line| eprintln!("{line}"))?;
    ensure!(failed == 0, "{failed} files failed");
    Ok(())
}

/// Upscales what `input` holds into `output`, tells of it line by line, and gives the number of files that failed.
pub(crate) fn upscale(input: &Path, output: &Path, mut say: impl FnMut(&str)) -> Result<usize> {
    let plan = plan::plan(&Request {
        inputs: vec![Source::Path(input.into())],
        output: Some(Output::Path(output.into())),
        format: Some("png".into()),
        ..Request::default()
    })?;
    // Loaded once, used for all.
    let mut upscaler = Upscaler::new(Options::new(ModelFiles::built_in()))?;
    let mut failed = plan.failed.len();
    for (index, task) in plan.tasks.iter().enumerate() {
        let what = format!("{} ({} of {})", task.source, index + 1, plan.tasks.len());
        if let Err(error) = one(&mut upscaler, task, |line| say(&format!("{what}: {line}"))) {
            say(&format!("{what}: {error:#}"));
            failed += 1;
        }
    }
    Ok(failed)
}

fn one(upscaler: &mut Upscaler, task: &Task, mut say: impl FnMut(&str)) -> Result<()> {
    let (Source::Path(input), Some(naming)) = (&task.source, task.target.naming()) else {
        return Ok(());
    };
    let low = files::read_picture(input, &ReadLimits::default())?;
    let settings = Settings {
        steps: 5,
        ..Settings::default()
    };
    let on_event = &mut |event| {
        match event {
            Event::Step {
                done,
                total: Some(total),
                seconds,
                ..
            } => say(&format!("step {done} of {total} in {seconds:.2} s")),
            Event::Warning(text) => say(&text),
            Event::Step { .. }
            | Event::Started(_)
            | Event::Loading(_)
            | Event::BaseStep { .. }
            | Event::Preview { .. }
            | Event::Finished { .. } => {}
        }
        Ok(())
    };
    let latents = upscaler.upscale(&[LowRes::image(&low.pixels)?], &settings, on_event)?;
    let pixels = upscaler.decode(&latents[0], on_event)?;
    let path = naming.path(pixels.width as u32, pixels.height as u32, None);
    std::fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    let picture = Picture::from_pixels(pixels);
    files::write(&path, &picture::encode(&picture, Format::Png, None)?.bytes)
}
