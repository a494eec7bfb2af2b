//! Results to files, as they come: what the input had besides colour is put back, and every write is whole or not at all.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, Cursor, Seek, SeekFrom, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender};

use anyhow::{Context, Result, anyhow, bail};
use sd_upscale::latents::Latents;
use sd_upscale::metadata::Metadata;
use sd_upscale::picture::{self, Alpha, Depth, Format, Outline, alpha, color_fix};
use sd_upscale::plan::Written;
use sd_upscale::{Pixels, Settings};

use crate::args::ColorFix;
use crate::comparison;
use crate::item::{Content, Item, LatentForm, LowResPlace, Place, Size, picture_format};
use crate::job::Job;
use crate::open_files::{OpenFile, OpenFiles};
use crate::parcel::{Handed, Parcel};
use crate::report::{Message, Outcome, Status};
use crate::stated::{base_settings, latents_metadata, low_res_metadata, written_settings};
use crate::threads::guarded;

/// Encodes and writes what comes until there is nothing more, and tells what became of each item.
pub fn write(
    job: &Job,
    inbox: &Receiver<Parcel>,
    files: &Arc<OpenFiles>,
    messages: &Sender<Message>,
) {
    let writer = Writer {
        job,
        files,
        messages,
    };
    for parcel in inbox {
        // All others are of an item, which takes them itself.
        if let Parcel::Item(handed) = parcel {
            writer.item(*handed, inbox);
        }
    }
}

struct Writer<'a> {
    job: &'a Job,
    files: &'a Arc<OpenFiles>,
    messages: &'a Sender<Message>,
}

/// An item's files, encoded, and not yet in their places.
struct Encoded {
    /// Width and height: pixels, or latent positions.
    size: Size,
    /// The result's first.
    files: Vec<Out>,
    warnings: Vec<String>,
    /// The picture, where it is wanted once more.
    kept: Option<Pixels>,
}

impl Writer<'_> {
    fn item(&self, handed: Handed, inbox: &Receiver<Parcel>) {
        let Handed {
            mut item,
            form,
            refused,
        } = handed;
        let mut parcels = Parcels::of(inbox);
        let encoded = guarded(|| self.encode(&mut item, form, &mut parcels)).flatten();
        if encoded.is_err() {
            refused.store(true, Ordering::Relaxed);
        }
        parcels.pass_over();
        // It goes before the result comes.
        item.preview = None;
        match encoded {
            Ok(encoded) => self.put(&item, encoded),
            Err(error) => self.tell(&item, Err(error)),
        }
    }

    /// Encodes what comes of an item, up to its end.
    fn encode(&self, item: &mut Item, form: LatentForm, parcels: &mut Parcels) -> Result<Encoded> {
        let mut colors = Metadata::default();
        let mut low = before(item);
        let mut encoded = match item.kind {
            Written::Image(format) => {
                let place = item.place.clone();
                let dressed = Dressed::of(self.job, item);
                colors = dressed.metadata.clone().color_only();
                self.picture(&dressed, format, &place, parcels)?
            }
            Written::Safetensors | Written::ComfyLatent => self.latents(item, form, parcels)?,
        };
        if item.decodes_low_res() {
            let dressed = Dressed::low_res(self.job, item);
            match &item.low_res {
                Some(low_res) => {
                    let format = picture_format(item.kind);
                    let place = Place::File(low_res.picture.clone());
                    let picture = self.picture(&dressed, format, &place, parcels)?;
                    encoded.files.extend(picture.files);
                    low = low.or(picture.kept);
                }
                None => low = Some(parcels.picture(whole)?.1),
            }
        }
        if let (Some(path), Some(low), Some(result)) = (&item.compare, low, encoded.kept.take()) {
            let both = comparison::beside(low, &result)?;
            let (place, format) = (Place::File(path.clone()), picture_format(item.kind));
            let dressed = Dressed {
                metadata: colors,
                ..Dressed::plain()
            };
            let (size, mut lines) = (Size::of(&both), pieces(&both));
            let (out, _) = self.encoded(&dressed, size, format, &place, &mut lines)?;
            encoded.files.push(out);
        }
        if let Some(LowResPlace {
            latents: Some(path),
            ..
        }) = &item.low_res
        {
            let place = Place::File(path.clone());
            let (values, size) = parcels.latents()?;
            let metadata = low_res_metadata(self.job, item, size, form);
            let kind = Written::Safetensors;
            let latents = self.latents_file(values, size, kind, &metadata, form, &place)?;
            encoded.files.push(latents);
        }
        parcels.closed()?;
        Ok(encoded)
    }

    /// Puts files in their places, or on standard output, and tells of it.
    fn put(&self, item: &Item, encoded: Encoded) {
        for warning in &encoded.warnings {
            let text = format!("{}: {warning}", item.source);
            let _ = self.messages.send(Message::Warning(text));
        }
        let mut files = Vec::new();
        let mut written = Ok(());
        for out in encoded.files {
            match out {
                Out::File(file) => files.push(file),
                // A pipe may be full for as long as it likes: nothing is held meanwhile.
                Out::Memory(bytes) => written = to_stdout(bytes.get_ref()),
            }
        }
        self.files.commit(files, |committed| {
            self.tell(item, written.and(committed).map(|()| encoded.size));
        });
    }

    /// Tells what became of an item.
    fn tell(&self, item: &Item, done: Result<Size>) {
        let outcome = match done {
            Ok(size) => Outcome {
                size: Some((size.width, size.height)),
                ..item.outcome(self.job, Status::Ok)
            },
            Err(error) => Outcome {
                error: Some(format!("{error:#}")),
                ..item.outcome(self.job, Status::Error)
            },
        };
        // The receiver is gone only where the run has ended.
        let _ = self.messages.send(Message::Done(outcome));
    }

    fn latents(&self, item: &Item, form: LatentForm, parcels: &mut Parcels) -> Result<Encoded> {
        let (values, size) = parcels.latents()?;
        let metadata = latents_metadata(self.job, item, size, form);
        let out = self.latents_file(values, size, item.kind, &metadata, form, &item.place)?;
        Ok(Encoded {
            size,
            files: vec![out],
            warnings: Vec::new(),
            kept: None,
        })
    }

    fn latents_file(
        &self,
        values: Vec<f32>,
        size: Size,
        kind: Written,
        metadata: &BTreeMap<String, String>,
        form: LatentForm,
        place: &Place,
    ) -> Result<Out> {
        let latents = Latents::from_scaled(values, 1, size.height, size.width);
        let bytes = match kind {
            Written::ComfyLatent => latents.to_comfy(form.scaling_factor, metadata)?,
            _ => latents.to_safetensors(metadata)?,
        };
        let mut out = self.open(place)?;
        if let Err(error) = out.write_all(&bytes) {
            return Err(out.failure().unwrap_or_else(|| error.into()));
        }
        Ok(out)
    }

    /// Encodes the picture that comes, from its beginning again where that is said.
    fn picture(
        &self,
        dressed: &Dressed,
        format: Format,
        place: &Place,
        parcels: &mut Parcels,
    ) -> Result<Encoded> {
        let (size, (out, warnings, kept)) =
            parcels.picture(|size, parcels| self.lines(dressed, size, format, place, parcels))?;
        Ok(Encoded {
            size,
            files: vec![out],
            warnings,
            kept,
        })
    }

    /// Encodes the lines that come.
    fn lines(
        &self,
        dressed: &Dressed,
        size: Size,
        format: Format,
        place: &Place,
        parcels: &mut Parcels,
    ) -> Result<(Out, Vec<String>, Option<Pixels>)> {
        let whole = match &dressed.reference {
            Some((low, times)) => {
                let mut whole = whole(size, parcels)?;
                fix_color(self.job.color_fix, &mut whole, low, *times);
                Some(whole)
            }
            None => dressed.kept.then(|| whole(size, parcels)).transpose()?,
        };
        let (out, warnings) = match &whole {
            Some(pixels) => self.encoded(dressed, size, format, place, &mut pieces(pixels)),
            None => self.encoded(dressed, size, format, place, &mut || parcels.lines()),
        }?;
        Ok((out, warnings, whole.filter(|_| dressed.kept)))
    }

    /// Encodes the lines that `next` gives.
    fn encoded(
        &self,
        dressed: &Dressed,
        size: Size,
        format: Format,
        place: &Place,
        next: &mut dyn FnMut() -> Result<Vec<f32>>,
    ) -> Result<(Out, Vec<String>)> {
        let outline = dressed.outline(self.job, size);
        let mut out = self.open(place)?;
        let encoded = picture::encode_lines(&outline, format, self.job.quality, next, &mut out);
        match (encoded, out.failure()) {
            (Ok(warnings), _) => Ok((out, warnings)),
            (Err(_), Some(failure)) => Err(failure),
            (Err(error), None) => Err(match &dressed.name {
                Some(name) => error.context(name.clone()),
                None => error,
            }),
        }
    }

    fn open(&self, place: &Place) -> Result<Out> {
        Ok(match place {
            Place::File(path) => Out::File(self.files.create(path)?),
            Place::Stdout => Out::Memory(Cursor::default()),
        })
    }
}

/// Lines of a whole picture that are encoded at a time.
const LINES: usize = 64;

/// A picture's lines, some at a time.
fn pieces(pixels: &Pixels) -> impl FnMut() -> Result<Vec<f32>> {
    let mut pieces = pixels.values.chunks(3 * pixels.width * LINES);
    move || {
        let piece = pieces.next().map(<[f32]>::to_vec);
        piece.with_context(out_of_order)
    }
}

/// The picture that an item was, where it is wanted beside the result.
fn before(item: &Item) -> Option<Pixels> {
    match (&item.content, &item.compare) {
        (Content::Picture(picture), Some(_)) => Some(picture.pixels.clone()),
        _ => None,
    }
}

/// Where an encoded file goes.
enum Out {
    File(OpenFile),
    /// To standard output in the end.
    Memory(Cursor<Vec<u8>>),
}

impl Out {
    /// What writing failed with, in words.
    fn failure(&mut self) -> Option<anyhow::Error> {
        match self {
            Out::File(file) => file.failure(),
            Out::Memory(_) => None,
        }
    }
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Out::File(file) => file.write(bytes),
            Out::Memory(memory) => memory.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Out::File(file) => file.flush(),
            Out::Memory(_) => Ok(()),
        }
    }
}

impl Seek for Out {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        match self {
            Out::File(file) => file.seek(to),
            Out::Memory(memory) => memory.seek(to),
        }
    }
}

fn to_stdout(bytes: &[u8]) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .context("cannot write to standard output")
}

/// What comes of one item.
struct Parcels<'a> {
    inbox: &'a Receiver<Parcel>,
    /// Whether more comes.
    open: bool,
    /// The picture that was coming comes again, from its beginning.
    again: Option<Size>,
    /// Why there are no more lines.
    failure: Option<anyhow::Error>,
}

impl<'a> Parcels<'a> {
    fn of(inbox: &'a Receiver<Parcel>) -> Self {
        Self {
            inbox,
            open: true,
            again: None,
            failure: None,
        }
    }

    /// # Errors
    /// The computing failed, or ended.
    fn next(&mut self) -> Result<Parcel> {
        match self.inbox.recv() {
            Ok(Parcel::Closed(done)) => {
                self.open = false;
                done?;
                Err(out_of_order())
            }
            Ok(parcel) => Ok(parcel),
            Err(_) => {
                self.open = false;
                bail!("the computing ended early")
            }
        }
    }

    fn begin(&mut self) -> Result<Size> {
        match self.next()? {
            Parcel::Begin(size) => Ok(size),
            _ => Err(out_of_order()),
        }
    }

    /// What `take` makes of the picture that comes, and its size: from its beginning again where that is said.
    fn picture<T>(
        &mut self,
        mut take: impl FnMut(Size, &mut Self) -> Result<T>,
    ) -> Result<(Size, T)> {
        let mut size = self.begin()?;
        loop {
            let taken = take(size, self);
            if let Some(again) = self.again.take() {
                size = again;
                continue;
            }
            // What the computing says comes before what that led to.
            let taken = match self.failure.take() {
                Some(error) => return Err(error),
                None => taken?,
            };
            match self.next()? {
                Parcel::End => return Ok((size, taken)),
                Parcel::Begin(again) => size = again,
                _ => return Err(out_of_order()),
            }
        }
    }

    /// The next lines. That there are none is kept as well, since an encoder may make other words of it.
    fn lines(&mut self) -> Result<Vec<f32>> {
        match self.next() {
            Ok(Parcel::Lines(values)) => Ok(values.take()),
            Ok(Parcel::Begin(size)) => {
                self.again = Some(size);
                bail!("the picture begins again")
            }
            Ok(_) => Err(out_of_order()),
            Err(error) => {
                self.failure = Some(error);
                bail!("the picture was not computed")
            }
        }
    }

    fn latents(&mut self) -> Result<(Vec<f32>, Size)> {
        match self.next()? {
            Parcel::Latents(values, size) => Ok((values.take(), size)),
            _ => Err(out_of_order()),
        }
    }

    /// The end of the item.
    fn closed(&mut self) -> Result<()> {
        let last = self.inbox.recv();
        self.open = !matches!(last, Ok(Parcel::Closed(_)) | Err(_));
        match last {
            Ok(Parcel::Closed(done)) => done,
            _ => Err(out_of_order()),
        }
    }

    /// Takes what is left of the item.
    fn pass_over(&mut self) {
        while self.open {
            self.open = !matches!(self.inbox.recv(), Ok(Parcel::Closed(_)) | Err(_));
        }
    }
}

fn out_of_order() -> anyhow::Error {
    anyhow!(
        "the parts of a result came out of order: this is a fault in this program; please report it"
    )
}

/// Whose settings a file states.
enum Stated {
    Result,
    /// Of the picture that the base checkpoint made.
    Base,
}

/// What the input had besides colour, and what is said of the result.
struct Dressed {
    /// What errors of encoding are led by.
    name: Option<String>,
    /// Of half the result's size in each direction, and that.
    alpha: Option<(Vec<f32>, Size)>,
    gray: bool,
    depth: Depth,
    metadata: Metadata,
    /// To be told of in the metadata, and how.
    settings: Option<(Settings, Stated)>,
    /// The input, where the result's colours are fixed by it, and how many times as large the result is.
    reference: Option<(Pixels, usize)>,
    /// Whether the picture is wanted once more.
    kept: bool,
}

impl Dressed {
    /// An opaque picture of 8 bits of which nothing is said.
    fn plain() -> Self {
        Self {
            name: None,
            alpha: None,
            gray: false,
            depth: Depth::Eight,
            metadata: Metadata::default(),
            settings: None,
            reference: None,
            kept: false,
        }
    }

    /// What it was upscaled from: of a picture that was made from a prompt, how.
    fn low_res(job: &Job, item: &Item) -> Self {
        let says = job.generate && !job.strip;
        Self {
            settings: says.then(|| (item.settings.clone(), Stated::Base)),
            kept: item.compare.is_some(),
            ..Self::plain()
        }
    }

    /// As the item's input: what it had is taken out of it.
    fn of(job: &Job, item: &mut Item) -> Self {
        let mut dressed = Self {
            name: Some(item.source.to_string()),
            settings: (!job.strip).then(|| (item.settings.clone(), Stated::Result)),
            kept: item.compare.is_some(),
            ..Self::plain()
        };
        match &mut item.content {
            Content::Picture(low) => {
                let size = Size {
                    width: low.pixels.width,
                    height: low.pixels.height,
                };
                let times = item.settings.scale.times();
                let alpha = low.alpha.take();
                dressed.alpha = alpha.map(|alpha| half_enlarged(alpha, size, times));
                dressed.gray = low.gray;
                dressed.depth = low.depth;
                dressed.metadata = std::mem::take(&mut low.metadata);
                let values = std::mem::take(&mut low.pixels.values);
                let low = Pixels {
                    values,
                    ..low.pixels
                };
                dressed.reference = (job.color_fix != ColorFix::None).then_some((low, times));
            }
            Content::Latents(latents) => dressed.metadata = latents.image_metadata(),
            Content::Prompt { .. } => {}
        }
        if job.strip {
            dressed.metadata = dressed.metadata.color_only();
        }
        dressed
    }

    /// Of a result of this size.
    fn outline(&self, job: &Job, size: Size) -> Outline<'_> {
        let mut metadata = Cow::Borrowed(&self.metadata);
        if let Some((settings, stated)) = &self.settings {
            let settings = match stated {
                Stated::Result => written_settings(job, settings, size),
                Stated::Base => base_settings(job, settings, size),
            };
            metadata.to_mut().add_settings(&settings);
        }
        Outline {
            width: size.width,
            height: size.height,
            alpha: self.alpha.as_ref().map(|(values, low)| Alpha::Halved {
                values: values.into(),
                width: low.width,
                height: low.height,
            }),
            gray: self.gray,
            depth: self.depth,
            metadata,
        }
    }
}

/// Transparency of half the size of what is `times` as large as the input, and that size.
fn half_enlarged(alpha: Vec<f32>, low: Size, times: usize) -> (Vec<f32>, Size) {
    let half = times / 2;
    let size = Size {
        width: half * low.width,
        height: half * low.height,
    };
    match half {
        1 => (alpha, size),
        _ => (alpha::enlarge(&alpha, low.width, low.height, half), size),
    }
}

/// The whole picture that comes.
fn whole(size: Size, parcels: &mut Parcels) -> Result<Pixels> {
    let count = 3 * size.width * size.height;
    let mut values = Vec::with_capacity(count);
    while values.len() < count {
        values.extend(parcels.lines()?);
    }
    Pixels::new(size.width, size.height, values)
}

/// Brings the colours of `made`, which is `times` as large as the input, back to the input's, in the way asked for.
fn fix_color(fix: ColorFix, made: &mut Pixels, low: &Pixels, times: usize) {
    let reference = || picture::enlarge(&low.values, low.width, low.height, 3, times);
    match fix {
        ColorFix::None => {}
        ColorFix::Adain => color_fix::adain(&mut made.values, &reference()),
        ColorFix::Wavelet => {
            color_fix::wavelet(&mut made.values, &reference(), made.width, made.height);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::atomic::AtomicBool;
    use std::sync::mpsc::channel;
    use std::time::Instant;

    use clap::Parser;
    use sd_upscale::PictureSink;
    use sd_upscale::latents::Scale;
    use sd_upscale::picture::Picture;
    use sd_upscale::plan::Source;

    use super::*;
    use crate::args::Args;
    use crate::parcel::{Outbox, outbox};

    const SIZE: Size = Size {
        width: 6,
        height: 130,
    };

    fn job(arguments: &str) -> Job {
        let program = ["sd-upscale", "in.png", "-o", "out.png"];
        let arguments = program.into_iter().chain(arguments.split_whitespace());
        Job::try_from(Args::parse_from(arguments)).unwrap()
    }

    fn item(job: &Job, path: PathBuf) -> Item {
        let low = Pixels::new(3, 65, vec![0.25; 3 * 3 * 65]).unwrap();
        Item {
            source: Source::Path("in.png".into()),
            content: Content::Picture(Picture::from_pixels(low)),
            settings: job.settings.clone(),
            kind: Written::Image(Format::Png),
            place: Place::File(path),
            low_res: None,
            compare: None,
            preview: None,
            expected: SIZE,
            of_many: false,
            scale: Scale::Scaled,
            evaluations: None,
            start: Instant::now(),
        }
    }

    fn form() -> LatentForm {
        LatentForm {
            scaling_factor: 1.0,
            pixels: 8,
        }
    }

    /// Lines of one value.
    fn lines(outbox: &mut Outbox, count: usize, value: f32) {
        outbox.lines(vec![value; 3 * SIZE.width * count]).unwrap();
    }

    /// What a writer makes of what `send` sends of `out.png` in `folder`.
    fn written(folder: &Path, job: &Job, send: impl FnOnce(&mut Outbox)) -> Outcome {
        let (mut outbox, inbox) = outbox();
        outbox
            .item(item(job, folder.join("out.png")), form())
            .unwrap();
        send(&mut outbox);
        drop(outbox);
        let (messages, told) = channel();
        write(job, &inbox, &Arc::default(), &messages);
        drop(messages);
        let told: Vec<Message> = told.iter().collect();
        match <[Message; 1]>::try_from(told) {
            Ok([Message::Done(outcome)]) => outcome,
            _ => panic!("not one outcome"),
        }
    }

    fn files_in(folder: &Path) -> usize {
        std::fs::read_dir(folder).unwrap().count()
    }

    #[test]
    fn a_picture_that_begins_again_is_the_one_that_came_last() {
        for arguments in ["", "--color-fix wavelet"] {
            let (job, folder) = (job(arguments), tempfile::tempdir().unwrap());
            let begin = |outbox: &mut Outbox| outbox.begin(SIZE.width, SIZE.height).unwrap();
            let once = written(folder.path(), &job, |outbox| {
                begin(outbox);
                lines(outbox, 130, 0.5);
                outbox.end_picture().unwrap();
                outbox.close(Ok(())).unwrap();
            });
            assert_eq!((once.status, once.size), (Status::Ok, Some((6, 130))));
            let expected = std::fs::read(folder.path().join("out.png")).unwrap();
            std::fs::remove_file(folder.path().join("out.png")).unwrap();
            let again = written(folder.path(), &job, |outbox| {
                begin(outbox);
                lines(outbox, 70, 0.75);
                // In the middle of it, and when all of it was given.
                begin(outbox);
                lines(outbox, 130, 1.0);
                begin(outbox);
                lines(outbox, 7, 0.5);
                lines(outbox, 123, 0.5);
                outbox.end_picture().unwrap();
                outbox.close(Ok(())).unwrap();
            });
            assert_eq!(again.status, Status::Ok);
            assert_eq!(files_in(folder.path()), 1);
            let found = std::fs::read(folder.path().join("out.png")).unwrap();
            assert!(found == expected, "{arguments}");
        }
    }

    #[test]
    fn what_the_computing_failed_with_is_told_in_its_words_and_leaves_no_file() {
        for arguments in ["", "--color-fix adain"] {
            let (job, folder) = (job(arguments), tempfile::tempdir().unwrap());
            for sent in [0, 70, 130] {
                let outcome = written(folder.path(), &job, |outbox| {
                    outbox.begin(SIZE.width, SIZE.height).unwrap();
                    if sent > 0 {
                        lines(outbox, sent, 0.5);
                    }
                    outbox.close(Err(anyhow!("the cable was cut"))).unwrap();
                });
                assert_eq!(outcome.status, Status::Error);
                assert_eq!(outcome.error.as_deref(), Some("the cable was cut"));
                assert_eq!(files_in(folder.path()), 0);
            }
        }
    }

    #[test]
    fn a_file_that_cannot_be_written_is_told_once_and_the_computing_hears_of_it() {
        let (job, folder) = (job(""), tempfile::tempdir().unwrap());
        let path = folder.path().join("no folder/out.png");
        std::fs::write(folder.path().join("no folder"), "a file").unwrap();
        let refused = Arc::new(AtomicBool::new(false));
        let (mut outbox, inbox) = outbox();
        outbox.begin(SIZE.width, SIZE.height).unwrap();
        lines(&mut outbox, 130, 0.5);
        outbox.close(Ok(())).unwrap();
        let (messages, told) = channel();
        let files = Arc::default();
        let writer = Writer {
            job: &job,
            files: &files,
            messages: &messages,
        };
        let handed = Handed {
            item: item(&job, path),
            form: form(),
            refused: refused.clone(),
        };
        writer.item(handed, &inbox);
        assert!(refused.load(Ordering::Relaxed));
        assert!(inbox.try_recv().is_err(), "parts of the item are left");
        drop(messages);
        let told: Vec<Message> = told.iter().collect();
        let [Message::Done(outcome)] = &told[..] else {
            panic!("not one outcome");
        };
        let error = outcome.error.as_deref().unwrap();
        assert!(error.starts_with("cannot create the folder"), "{error}");
    }
}
