//! A convolution's input as the kernels read it: one or two maps side by side in the channels, an affine map and an
//! activation, a nearest-neighbour upsampling, all applied while pixels are copied into scratch.

use super::act::{Act, PointFn, with_act};
use super::micro::SLAB;
use super::simd::{Simd, isa_fn, prefetch};
use super::values::{AnyPtr, Precision, Values};

/// `act(x * scale + shift)`, with scale and shift per batch item and channel: what a GroupNorm (or AdaGroupNorm) and its
/// activation come to once the statistics are known.
pub struct Prologue {
    /// (b, c), and `SLAB` zeros behind so that whole slabs can be read.
    scale: Vec<f32>,
    /// The same.
    shift: Vec<f32>,
    act: Act,
}

impl Prologue {
    /// `scale` and `shift` (b, c).
    ///
    /// # Panics
    /// If their lengths differ.
    pub fn new(mut scale: Vec<f32>, mut shift: Vec<f32>, act: Act) -> Self {
        assert_eq!(scale.len(), shift.len(), "scale and shift are both (b, c)");
        for v in [&mut scale, &mut shift] {
            v.resize(v.len() + SLAB, 0.0);
        }
        Self { scale, shift, act }
    }

    /// b * c.
    pub(super) fn len(&self) -> usize {
        self.scale.len() - SLAB
    }
}

/// Lines of a map (b, h, w, c), each (w, c).
#[derive(Clone)]
struct Part<'a> {
    /// Those of the first batch item, then those of the next.
    lines: Vec<Values<'a>>,
    /// Of each item.
    count: usize,
    c: usize,
}

impl<'a> Part<'a> {
    /// `pieces` are bands of lines, each (b, any, w, c), that follow each other.
    fn new(pieces: &[Values<'a>], b: usize, w: usize, c: usize) -> Self {
        let line = w * c;
        for piece in pieces {
            assert!(
                piece.len().is_multiple_of((b * line).max(1)),
                "a piece of a map is (b, lines, w, c) = ({b}, …, {w}, {c})"
            );
        }
        let of_item = |item: usize| {
            pieces.iter().flat_map(move |piece| {
                let lines = piece.len() / b / line.max(1);
                (item * lines..(item + 1) * lines)
                    .map(move |i| piece.part(i * line..(i + 1) * line))
            })
        };
        let lines: Vec<Values> = (0..b).flat_map(of_item).collect();
        let count = lines.len() / b.max(1);
        Self { lines, count, c }
    }

    /// No channels at all.
    fn none() -> Self {
        Self {
            lines: Vec::new(),
            count: 0,
            c: 0,
        }
    }
}

/// What a kernel reads: a map `x` (b, h, w, c), or the concatenation of two along the channels, through an optional
/// [`Prologue`] and then an optional nearest-neighbour upsampling by 2. Not all lines need be there: those that a kernel is
/// asked for, and what it reads around them.
#[derive(Clone)]
pub struct Input<'a> {
    parts: [Part<'a>; 2],
    /// The first line that is there.
    first: usize,
    b: usize,
    h: usize,
    w: usize,
    precision: Precision,
    prologue: Option<&'a Prologue>,
    upsample: bool,
}

impl<'a> Input<'a> {
    /// `x` (b, h, w, c).
    ///
    /// # Panics
    /// If its length is not b * h * w * c.
    pub fn new(x: impl Into<Values<'a>>, b: usize, h: usize, w: usize, c: usize) -> Self {
        let x = x.into();
        assert_eq!(
            x.len(),
            b * h * w * c,
            "the input is (b, h, w, c) = ({b}, {h}, {w}, {c})"
        );
        Self::bands(&[x], 0, b, h, w, c)
    }

    /// A map (b, h, w, c) of which there are the lines from `first` on that `pieces` hold, each (b, any number of lines, w, c).
    ///
    /// # Panics
    /// If they are more than h lines, a piece has no whole lines, or they are kept in different types.
    pub fn bands<P: Copy + Into<Values<'a>>>(
        pieces: &[P],
        first: usize,
        b: usize,
        h: usize,
        w: usize,
        c: usize,
    ) -> Self {
        let pieces: Vec<Values> = pieces.iter().map(|&piece| piece.into()).collect();
        let part = Part::new(&pieces, b, w, c);
        let precision = pieces.first().map_or(Precision::F32, Values::precision);
        assert_kept_as(precision, &pieces);
        assert!(
            first + part.count <= h,
            "lines {first} to {} of {h}",
            first + part.count
        );
        Self {
            parts: [part, Part::none()],
            first,
            b,
            h,
            w,
            precision,
            prologue: None,
            upsample: false,
        }
    }

    /// With `skip` behind it in the channels: pieces (b, any, w, c) of the same lines.
    ///
    /// # Panics
    /// If they are of other lines, or kept in another type.
    pub fn beside<P: Copy + Into<Values<'a>>>(mut self, skip: &[P], c: usize) -> Self {
        let skip: Vec<Values> = skip.iter().map(|&piece| piece.into()).collect();
        assert_kept_as(self.precision, &skip);
        let part = Part::new(&skip, self.b, self.w, c);
        assert_eq!(
            part.count, self.parts[0].count,
            "the second input has the lines of the first"
        );
        self.parts[1] = part;
        self
    }

    /// Through `prologue`, whose scale and shift are (b, all channels).
    ///
    /// # Panics
    /// If they are not.
    pub fn prologue(mut self, prologue: &'a Prologue) -> Self {
        assert_eq!(
            prologue.len(),
            self.b * self.channels(),
            "the prologue is (b, c)"
        );
        self.prologue = Some(prologue);
        self
    }

    /// As if every pixel were repeated twice in both directions.
    pub fn upsample2x(mut self) -> Self {
        self.upsample = true;
        self
    }

    /// (b, h, w) after upsampling.
    pub fn shape(&self) -> (usize, usize, usize) {
        let f = if self.upsample { 2 } else { 1 };
        (self.b, self.h * f, self.w * f)
    }

    /// Channels of all parts.
    pub fn channels(&self) -> usize {
        self.parts[0].c + self.parts[1].c
    }

    /// What its maps are kept as.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Columns, before upsampling.
    pub(super) fn width(&self) -> usize {
        self.w
    }

    /// Channels of each part; the second may have none.
    pub(super) fn widths(&self) -> [usize; 2] {
        [self.parts[0].c, self.parts[1].c]
    }

    /// Line `y` of item `b` as it is in memory, (w, c), in each part; before prologue and upsampling.
    ///
    /// # Panics
    /// If it is not there.
    pub(super) fn line(&self, b: usize, y: usize) -> [Values<'a>; 2] {
        let at = |part: &Part<'a>| match part.c {
            0 => Values::F32(&[]),
            _ => {
                let y = y - self.first;
                assert!(y < part.count, "a line that is there");
                part.lines[b * part.count + y]
            }
        };
        [at(&self.parts[0]), at(&self.parts[1])]
    }

    /// Whether all of these lines (after upsampling) are there.
    pub(super) fn has(&self, lines: std::ops::Range<usize>) -> bool {
        let f = if self.upsample { 2 } else { 1 };
        let there = self.first..self.first + self.parts[0].count;
        lines.is_empty() || (lines.start / f >= there.start && (lines.end - 1) / f < there.end)
    }
}

fn assert_kept_as(precision: Precision, pieces: &[Values]) {
    assert!(
        pieces.iter().all(|piece| piece.precision() == precision),
        "all pieces of a map are kept as {precision:?}"
    );
}

/// A pixel of a map as a kernel sees it, after upsampling.
#[derive(Clone, Copy)]
struct Pixel {
    b: usize,
    y: usize,
    x: usize,
}

/// Which input pixel each row of an im2col matrix takes for one tap of the kernel.
#[derive(Clone, Copy)]
pub(super) struct Gather {
    /// The output's first line, and (h, w).
    pub first: usize,
    pub oh: usize,
    pub ow: usize,
    pub stride: usize,
    /// The tap's position in the input for output (0, 0).
    pub dy: isize,
    pub dx: isize,
}

isa_fn! {
    /// Stages `n` rows of an im2col matrix from row `first` on, channels `c0..c1`, rows 16 apart.
    ///
    /// # Safety
    /// `dst` has room for `n` rows and the channels rounded up to 16; the rows exist (their batch items, that is); `c0` is a
    /// multiple of 16, `c1` at most the input's channels.
    pub(super) fn stage_rows = stage_rows_body(
        input: &Input, gather: Gather, c0: usize, c1: usize, first: usize, n: usize, dst: *mut f32, slab_stride: usize,
    )
}

/// # Safety
/// That of [`stage_rows`], on a machine that has `S`.
#[inline(always)]
unsafe fn stage_rows_body<S: Simd>(
    input: &Input,
    gather: Gather,
    c0: usize,
    c1: usize,
    first: usize,
    n: usize,
    dst: *mut f32,
    slab_stride: usize,
) {
    let (_, h, w) = input.shape();
    let at = |i: usize| {
        let (line, x) = ((first + i) / gather.ow, (first + i) % gather.ow);
        let (b, y) = (line / gather.oh, line % gather.oh);
        let y = ((gather.first + y) * gather.stride).wrapping_add_signed(gather.dy);
        let x = (x * gather.stride).wrapping_add_signed(gather.dx);
        (y < h && x < w).then_some(Pixel { b, y, x })
    };
    // SAFETY: `at` gives pixels inside the map, of batch items that exist as the rows do; the rest is promised.
    unsafe { stage::<S>(input, c0, c1, n, at, dst, SLAB, slab_stride) }
}

/// A rectangle of pixels, possibly reaching over the input's edges.
#[derive(Clone, Copy)]
pub(super) struct Region {
    pub b: usize,
    pub y: isize,
    pub x: isize,
    pub h: usize,
    pub w: usize,
}

isa_fn! {
    /// Stages a region's channels `c0..c1` as (h, w, c1 - c0 rounded up to 16).
    ///
    /// # Safety
    /// `dst` has room for that; batch item `region.b` exists; `c0` is a multiple of 16, `c1` at most the input's channels.
    pub(super) fn stage_region = stage_region_body(input: &Input, region: Region, c0: usize, c1: usize, dst: *mut f32)
}

/// # Safety
/// That of [`stage_region`], on a machine that has `S`.
#[inline(always)]
unsafe fn stage_region_body<S: Simd>(
    input: &Input,
    region: Region,
    c0: usize,
    c1: usize,
    dst: *mut f32,
) {
    let (_, h, w) = input.shape();
    let at = |i: usize| {
        let y = (i / region.w).wrapping_add_signed(region.y);
        let x = (i % region.w).wrapping_add_signed(region.x);
        let b = region.b;
        (y < h && x < w).then_some(Pixel { b, y, x })
    };
    // SAFETY: `at` gives pixels inside the map, of a batch item that exists; the rest is promised.
    unsafe {
        stage::<S>(
            input,
            c0,
            c1,
            region.h * region.w,
            at,
            dst,
            (c1 - c0).next_multiple_of(SLAB),
            SLAB,
        )
    }
}

/// Copies channels `c0..c1` of `n` pixels to `dst`, activated. Pixel i comes from `at(i)`, zeros where that is
/// none; its 16-channel slab s goes to `dst + i * pixel_stride + s * slab_stride`. Lanes beyond c1 are arbitrary.
///
/// # Safety
/// The machine has `S`; `dst` has room for that; `at` stays inside [`Input::shape`]; `c0` is a multiple of 16, `c1` at most
/// [`Input::channels`].
#[inline(always)]
unsafe fn stage<S: Simd>(
    input: &Input,
    c0: usize,
    c1: usize,
    n: usize,
    at: impl Fn(usize) -> Option<Pixel>,
    dst: *mut f32,
    pixel_stride: usize,
    slab_stride: usize,
) {
    // SAFETY: the caller's promise is the same; scale and shift are (b, channels), as `Input::prologue` saw, and SLAB values
    // behind.
    unsafe {
        match input.prologue {
            None => stage_with::<S, _>(input, c0, c1, n, at, dst, pixel_stride, slab_stride, Plain),
            Some(p) => {
                let (scale, shift, channels) =
                    (p.scale.as_ptr(), p.shift.as_ptr(), input.channels());
                with_act!(p.act, act => {
                    let map = Affine { scale, shift, channels, act };
                    stage_with::<S, _>(input, c0, c1, n, at, dst, pixel_stride, slab_stride, map)
                })
            }
        }
    }
}

/// Pixels from the one being staged to the one being fetched.
const AHEAD: usize = 4;

/// What happens to a value of batch item `b`, channel `c` on its way. (A trait, because closures need not be inlined
/// into the functions compiled for an instruction set.)
trait Map: Copy {
    /// # Safety
    /// The map has batch item `b` and channel `c`, of which the vector's first value is.
    unsafe fn map<S: Simd>(self, x: S, b: usize, c: usize) -> S;
}

#[derive(Clone, Copy)]
struct Plain;

/// `act(x * scale + shift)`, both (b, channels) with SLAB values behind.
#[derive(Clone, Copy)]
struct Affine<F> {
    scale: *const f32,
    shift: *const f32,
    channels: usize,
    act: F,
}

impl Map for Plain {
    #[inline(always)]
    unsafe fn map<S: Simd>(self, x: S, _: usize, _: usize) -> S {
        x
    }
}

impl<F: PointFn> Map for Affine<F> {
    #[inline(always)]
    unsafe fn map<S: Simd>(self, x: S, b: usize, c: usize) -> S {
        let i = b * self.channels + c;
        // SAFETY: `x` proves the instructions; (b, c) exists, and SLAB values more can be read, no fewer than a vector has.
        let (scale, shift) = unsafe { (S::load(self.scale.add(i)), S::load(self.shift.add(i))) };
        self.act.eval(x.mul_add(scale, shift))
    }
}

/// # Safety
/// That of [`stage`]; `map` has the input's batch items and channels.
#[inline(always)]
unsafe fn stage_with<S: Simd, M: Map>(
    input: &Input,
    c0: usize,
    c1: usize,
    n: usize,
    at: impl Fn(usize) -> Option<Pixel>,
    dst: *mut f32,
    pixel_stride: usize,
    slab_stride: usize,
    map: M,
) {
    // SAFETY: the pixel is inside both parts' lines, (w, ca) and (w, cb), since `at` is inside the map after upsampling and `line`
    // gives lines that are there. A slab is read from a part that has all of its 16 channels, else from `tail`, which takes
    // channel by channel what there is. What is written is the caller's promise: whole slabs, so whole vectors.
    unsafe {
        let [ca, cb] = input.widths();
        let shift = usize::from(input.upsample);
        for i in 0..n {
            let mut to = dst.add(i * pixel_stride);
            let Some(Pixel { b, y, x }) = at(i) else {
                for _ in (c0..c1).step_by(SLAB) {
                    to.write_bytes(0, SLAB);
                    to = to.add(slab_stride);
                }
                continue;
            };
            let (y, x) = (y >> shift, x >> shift);
            let [left, right] = input.line(b, y);
            let from = [left.from(0).at(x * ca), right.from(0).at(x * cb)];
            for c in (c0..c1).step_by(SLAB) {
                let mut tail = [0f32; SLAB];
                let src = if c + SLAB <= ca {
                    from[0].at(c)
                } else if c >= ca && c + SLAB <= ca + cb {
                    from[1].at(c - ca)
                } else {
                    for (k, t) in tail.iter_mut().enumerate().take(ca + cb - c) {
                        *t = if c + k < ca {
                            from[0].at(c + k).get()
                        } else {
                            from[1].at(c + k - ca).get()
                        };
                    }
                    AnyPtr::new(tail.as_ptr())
                };
                // A pixel further on: its lines are too far apart for the hardware to guess.
                prefetch(src.at(AHEAD * if c < ca { ca } else { cb }).address());
                for v in (0..SLAB).step_by(S::LANES) {
                    map.map(src.at(v).load::<S>(), b, c + v).store(to.add(v));
                }
                to = to.add(slab_stride);
            }
        }
    }
}
