//! `--grid`: the outputs of several seeds and guidances in one picture, each under a label.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use embedded_graphics::Pixel;
use embedded_graphics::mono_font::MonoTextStyle;
use embedded_graphics::mono_font::iso_8859_1::FONT_10X20;
use embedded_graphics::pixelcolor::BinaryColor;
use embedded_graphics::prelude::{Dimensions, DrawTarget, Drawable, Point, Size as Extent};
use embedded_graphics::primitives::Rectangle;
use embedded_graphics::text::{Baseline, Text};
use sd_upscale::Pixels;
use sd_upscale::files;
use sd_upscale::limits::ReadLimits;
use sd_upscale::metadata::Metadata;
use sd_upscale::picture::{self, Depth, Format, Outline, Picture};
use sd_upscale::plan::{Claims, Origin, Plan, Source, Target, UsageError, Variant, Written};

use crate::job::Job;
use crate::open_files::OpenFiles;
use crate::report::{Outcome, Which, which};
use crate::size::Size;

/// Of a letter.
const LETTER: Size = Size {
    width: 10,
    height: 20,
};
/// Around pictures and labels, in pixels of a letter.
const GAP: usize = 8;
/// Pictures up to this wide have labels of [`LETTER`]; wider ones larger ones in proportion.
const SMALL: usize = 640;
/// What stands for a picture that failed.
const GREY: f32 = 0.75;

/// What the picture is made of, as the run goes on.
pub struct Grid {
    file: PathBuf,
    format: Format,
    quality: Option<u8>,
    /// In their order.
    inputs: Vec<String>,
    variants: Vec<Variant>,
    /// Of each input and variant, those that are there; of a file of several latents several.
    outputs: HashMap<Which, Vec<PathBuf>>,
}

impl Grid {
    /// Checks that there will be what it shows and a place for it, and takes that place.
    ///
    /// # Errors
    /// There is one value alone, latents are written, or the file is another's or in a format that is not written.
    pub fn planned(job: &Job, plan: &mut Plan) -> Result<Option<Self>> {
        let Some(file) = &job.grid else {
            return Ok(None);
        };
        let wrong = |what: String| UsageError(format!("--grid {}: {what}", file.display()));
        let variants = job.request.variants.clone();
        ensure!(
            variants.len() > 1,
            wrong("it shows several seeds or guidances: give --seed 1,2,3 or -g 0,1,4".into())
        );
        let of_latents = |target: &Target| match target {
            Target::File(naming) => !matches!(naming.kind(), Written::Image(_)),
            Target::Stdout(_) => true,
        };
        ensure!(
            !plan.tasks.iter().any(|task| of_latents(&task.target)),
            wrong("it shows pictures, and latents are written: choose an image format".into())
        );
        let extension = file.extension().unwrap_or_default().to_string_lossy();
        let format = Format::from_extension(&extension).filter(|format| format.is_writable());
        let format = format.ok_or_else(|| {
            wrong(format!(
                "`{extension}` is no format that is written: give png, jpg, webp, tif, bmp or jxl"
            ))
        })?;
        take(&mut plan.claims, file).map_err(|error| wrong(format!("{error:#}")))?;
        let mut inputs: Vec<String> = plan
            .tasks
            .iter()
            .map(|task| task.source.to_string())
            .collect();
        inputs.dedup();
        Ok(Some(Self {
            file: file.clone(),
            format,
            quality: job.quality,
            inputs,
            variants,
            outputs: HashMap::new(),
        }))
    }

    /// Whether it can be written where it is to go; better now than after the work.
    ///
    /// # Errors
    /// It cannot.
    pub fn try_place(&self) -> Result<()> {
        files::try_write(&self.file).context("--grid")
    }

    /// Takes note of what became of an input.
    pub fn add(&mut self, outcome: &Outcome) {
        if let (None, Some(output)) = (&outcome.error, &outcome.output) {
            let outputs = self.outputs.entry(outcome.which()).or_default();
            outputs.push(output.into());
        }
    }

    /// Writes it: what failed is an empty place. None where nothing is there to show.
    ///
    /// # Errors
    /// An output is gone, or it cannot be written, or not of this size.
    pub fn write(mut self, files: &Arc<OpenFiles>) -> Result<Option<PathBuf>> {
        if self.outputs.is_empty() {
            return Ok(None);
        }
        // `out-2.png` before `out-10.png`, which differ in that alone.
        for outputs in self.outputs.values_mut() {
            outputs.sort_by_key(|path| (path.as_os_str().len(), path.clone()));
        }
        let rows = self.rows()?;
        self.encode(rows, files)
            .with_context(|| format!("--grid {}", self.file.display()))?;
        Ok(Some(self.file))
    }

    fn encode(&self, rows: Vec<Row>, files: &Arc<OpenFiles>) -> Result<()> {
        let sheet = Sheet::of(&rows);
        let outline = Outline {
            width: sheet.width,
            height: rows.iter().map(|row| row.height(sheet.letter)).sum(),
            alpha: None,
            gray: false,
            depth: Depth::Eight,
            metadata: Cow::Owned(Metadata::default()),
        };
        let mut rows = VecDeque::from(rows);
        let mut next = || {
            let row = rows.pop_front().context("rows of the grid are missing")?;
            sheet.drawn(&row)
        };
        let mut out = files.create(&self.file)?;
        let encoded =
            picture::encode_lines(&outline, self.format, self.quality, &mut next, &mut out);
        if let Some(failure) = out.failure() {
            return Err(failure);
        }
        encoded?;
        let mut written = Ok(());
        files.commit(vec![out], |committed| written = committed);
        written
    }

    /// From the top down: of each picture of an input its name, where there are several, and its outputs.
    fn rows(&self) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for input in &self.inputs {
            let of = |variant: Variant| self.outputs.get(&which(input, variant));
            let each: Vec<_> = self.variants.iter().map(|&variant| of(variant)).collect();
            let most = each.iter().flatten().map(|outputs| outputs.len()).max();
            let most = most.unwrap_or(1);
            for number in 0..most {
                let name = match most {
                    1 => input.clone(),
                    _ => format!("{input} {}", number + 1),
                };
                if self.inputs.len() > 1 || most > 1 {
                    rows.push(Row::Heading(name));
                }
                let cells = std::iter::zip(&self.variants, &each).map(|(&variant, outputs)| {
                    let output = outputs.and_then(|outputs| outputs.get(number));
                    Cell::of(self.label(variant), output)
                });
                let cells: Vec<Cell> = cells.collect::<Result<_>>()?;
                rows.extend(
                    cells
                        .chunks(self.columns())
                        .map(|cells| Row::Cells(cells.to_vec())),
                );
            }
        }
        Ok(rows)
    }

    fn differ<T: PartialEq>(&self, value: impl Fn(&Variant) -> T) -> bool {
        let first = self.variants.first().map(&value);
        self.variants
            .iter()
            .any(|variant| Some(value(variant)) != first)
    }

    /// A line for each seed where guidances differ as well, else about as many lines as columns.
    fn columns(&self) -> usize {
        let seeds = self.differ(|variant| variant.seed);
        let guidances = self.differ(|variant| variant.guidance);
        if seeds && guidances {
            let first = self.variants[0].seed;
            return self
                .variants
                .iter()
                .filter(|variant| variant.seed == first)
                .count();
        }
        (self.variants.len() as f64).sqrt().ceil() as usize
    }

    /// What an output differs by from others.
    fn label(&self, variant: Variant) -> String {
        let seed = self.differ(|variant| variant.seed);
        let guidance = self.differ(|variant| variant.guidance);
        let parts = [
            seed.then(|| format!("seed {}", variant.seed)),
            guidance.then(|| format!("guidance {}", variant.guidance)),
        ];
        parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

/// # Errors
/// It is an input's, or an output's.
fn take(claims: &mut Claims, file: &Path) -> Result<()> {
    let origin = Origin {
        source: Source::Path("--grid".into()),
        variant: Variant::default(),
    };
    Ok(claims.claim(file, &origin)?)
}

/// A line of the grid.
enum Row {
    Heading(String),
    Cells(Vec<Cell>),
}

/// An output under its label.
#[derive(Clone)]
struct Cell {
    label: String,
    /// None: it failed.
    output: Option<(PathBuf, Size)>,
}

impl Cell {
    fn of(label: String, output: Option<&PathBuf>) -> Result<Self> {
        let sized = |path: &PathBuf| -> Result<_> {
            let header = files::read_header(path)?;
            let size = Size {
                width: header.width,
                height: header.height,
            };
            Ok((path.clone(), size))
        };
        let output = output.map(sized).transpose().context("--grid")?;
        let label = match output {
            Some(_) => label,
            None => format!("{label}: failed"),
        };
        Ok(Self { label, output })
    }

    fn size(&self) -> Size {
        let none = Size {
            width: 0,
            height: 0,
        };
        self.output.as_ref().map_or(none, |(_, size)| *size)
    }

    /// On white, where it is transparent.
    fn pixels(&self) -> Result<Option<Pixels>> {
        let Some((path, size)) = &self.output else {
            return Ok(None);
        };
        let limits = ReadLimits {
            max_pixels: u64::MAX,
        };
        let Picture {
            mut pixels, alpha, ..
        } = files::read_picture(path, &limits)?;
        ensure!(
            Size::of(&pixels) == *size,
            "{} was changed while it was read",
            path.display()
        );
        if let Some(alpha) = alpha {
            for (pixel, a) in pixels.values.chunks_mut(3).zip(alpha) {
                for value in pixel {
                    *value = *value * a + (1.0 - a);
                }
            }
        }
        Ok(Some(pixels))
    }
}

impl Row {
    fn height(&self, letter: usize) -> usize {
        let strip = (LETTER.height + 2 * GAP) * letter;
        match self {
            Row::Heading(_) => strip,
            Row::Cells(cells) => {
                let tallest = cells.iter().map(|cell| cell.size().height).max();
                strip + tallest.unwrap_or(0) + GAP * letter
            }
        }
    }
}

/// What all rows have in common.
struct Sheet {
    width: usize,
    /// Of each column, its picture or label.
    columns: Vec<usize>,
    /// How many times as large letters are.
    letter: usize,
}

impl Sheet {
    fn of(rows: &[Row]) -> Self {
        let cells = || {
            let cells = rows.iter().filter_map(|row| match row {
                Row::Cells(cells) => Some(cells),
                Row::Heading(_) => None,
            });
            cells.flat_map(|cells| cells.iter().enumerate())
        };
        let widest = cells().map(|(_, cell)| cell.size().width).max();
        let letter = widest.unwrap_or(0).div_ceil(SMALL).max(1);
        let mut columns = Vec::new();
        for (column, cell) in cells() {
            if column == columns.len() {
                columns.push(0);
            }
            let label = cell.label.chars().count() * LETTER.width * letter;
            columns[column] = columns[column].max(cell.size().width).max(label);
        }
        let gaps = GAP * letter * (columns.len() + 1);
        let headings = rows.iter().map(|row| match row {
            Row::Heading(name) => (name.chars().count() * LETTER.width + 2 * GAP) * letter,
            Row::Cells(_) => 0,
        });
        let heading = headings.max().unwrap_or(0);
        Self {
            width: heading.max(columns.iter().sum::<usize>() + gaps),
            columns,
            letter,
        }
    }

    /// The lines of one, (n, width, 3).
    fn drawn(&self, row: &Row) -> Result<Vec<f32>> {
        let (letter, gap) = (self.letter, GAP * self.letter);
        let mut canvas = Canvas {
            width: self.width,
            height: row.height(letter),
            values: vec![1.0; 3 * self.width * row.height(letter)],
            letter,
            left: 0,
        };
        match row {
            Row::Heading(name) => canvas.write(name, gap),
            Row::Cells(cells) => {
                let mut left = gap;
                for (cell, column) in cells.iter().zip(&self.columns) {
                    canvas.write(&cell.label, left);
                    let top = (LETTER.height + 2 * GAP) * letter;
                    match cell.pixels()? {
                        Some(pixels) => canvas.put(&pixels, left, top),
                        None => canvas.fill(left, top, *column, GREY),
                    }
                    left += column + gap;
                }
            }
        }
        Ok(canvas.values)
    }
}

/// Lines of the grid while they are drawn: 1 is white.
struct Canvas {
    width: usize,
    height: usize,
    values: Vec<f32>,
    letter: usize,
    /// Where a text begins.
    left: usize,
}

impl Canvas {
    fn write(&mut self, text: &str, left: usize) {
        self.left = left;
        let style = MonoTextStyle::new(&FONT_10X20, BinaryColor::On);
        let at = Point::new(0, GAP as i32);
        let Ok(_) = Text::with_baseline(text, at, style, Baseline::Top).draw(self);
    }

    fn put(&mut self, pixels: &Pixels, left: usize, top: usize) {
        for (line, values) in pixels.values.chunks(3 * pixels.width).enumerate() {
            let at = 3 * ((top + line) * self.width + left);
            self.values[at..][..values.len()].copy_from_slice(values);
        }
    }

    /// To the bottom, but for a gap.
    fn fill(&mut self, left: usize, top: usize, width: usize, value: f32) {
        for line in top..self.height - GAP * self.letter {
            let at = 3 * (line * self.width + left);
            self.values[at..][..3 * width].fill(value);
        }
    }
}

impl Dimensions for Canvas {
    fn bounding_box(&self) -> Rectangle {
        Rectangle::new(Point::zero(), Extent::new(u32::MAX, u32::MAX))
    }
}

/// Letters, each point of them a square; what lies outside is cut off.
impl DrawTarget for Canvas {
    type Color = BinaryColor;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<BinaryColor>>>(
        &mut self,
        pixels: I,
    ) -> Result<(), Infallible> {
        for Pixel(Point { x, y }, color) in pixels {
            let (Ok(x), Ok(y)) = (usize::try_from(x), usize::try_from(y)) else {
                continue;
            };
            if !color.is_on() {
                continue;
            }
            let letter = self.letter;
            let columns = self.left + x * letter..(self.left + (x + 1) * letter).min(self.width);
            for line in y * letter..((y + 1) * letter).min(self.height) {
                for column in columns.clone() {
                    self.values[3 * (line * self.width + column)..][..3].fill(0.0);
                }
            }
        }
        Ok(())
    }
}
