//! What values are kept as in memory: float32, or half of it, bfloat16 or float16. Kernels compute in float32 and round once, when
//! they write, to the nearest number of the type and of two to the even one: the same bits on every instruction set.

use std::ops::Range;

use half::{bf16, f16};

use super::scalar::Scalar;
use super::simd::{MOST_LANES, Simd, isa_fn};

/// A type that values are kept in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// `f32`.
    F32,
    /// `half::bf16`: the range of float32 with 8 bits of mantissa.
    Bf16,
    /// `half::f16`: 11 bits of mantissa up to 65504, infinities beyond.
    F16,
}

impl Precision {
    /// Bytes of a value.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// A number as it is kept in memory.
pub trait Value: Scalar + Default + Send + Sync + 'static {
    /// Which one it is.
    const PRECISION: Precision;

    /// A slice of them, for kernels that are told at run time.
    fn values(slice: &[Self]) -> Values<'_>;

    /// The inverse; None for values of another type.
    fn of_values(values: Values<'_>) -> Option<&[Self]>;

    /// # Safety
    /// The machine has the instruction set; as many values as `S` has lanes can be read at `p`.
    #[doc(hidden)]
    unsafe fn load<S: Simd>(p: *const Self) -> S;

    /// # Safety
    /// As many values as `S` has lanes can be written at `p`.
    #[doc(hidden)]
    unsafe fn store<S: Simd>(x: S, p: *mut Self);

    /// A vector, or where `n` is less than its lanes the first `n` values from `p`, the rest zero.
    ///
    /// # Safety
    /// The machine has the instruction set; the smaller of `n` and the lanes of `S` can be read at `p`.
    #[doc(hidden)]
    #[inline(always)]
    unsafe fn load_up_to<S: Simd>(p: *const Self, n: usize) -> S {
        // SAFETY: the caller answers for what is read at `p`, `t` has room for a vector.
        unsafe {
            if n >= S::LANES {
                return Self::load(p);
            }
            let mut t = [Self::default(); MOST_LANES];
            std::ptr::copy_nonoverlapping(p, t.as_mut_ptr(), n);
            Self::load(t.as_ptr())
        }
    }

    /// Stores a vector, or where `n` is less than its lanes the first `n` values.
    ///
    /// # Safety
    /// The smaller of `n` and the lanes of `S` can be written at `p`.
    #[doc(hidden)]
    #[inline(always)]
    unsafe fn store_up_to<S: Simd>(x: S, p: *mut Self, n: usize) {
        // SAFETY: the caller answers for what is written at `p`, `t` has room for a vector.
        unsafe {
            if n >= S::LANES {
                return Self::store(x, p);
            }
            let mut t = [Self::default(); MOST_LANES];
            Self::store(x, t.as_mut_ptr());
            std::ptr::copy_nonoverlapping(t.as_ptr(), p, n);
        }
    }
}

impl Value for f32 {
    const PRECISION: Precision = Precision::F32;

    fn values(slice: &[Self]) -> Values<'_> {
        Values::F32(slice)
    }

    fn of_values(values: Values<'_>) -> Option<&[Self]> {
        match values {
            Values::F32(slice) => Some(slice),
            _ => None,
        }
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S {
        // SAFETY: the caller's promise is the same, as below.
        unsafe { S::load(p) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(x: S, p: *mut Self) {
        // SAFETY: as above.
        unsafe { x.store(p) }
    }

    #[inline(always)]
    unsafe fn load_up_to<S: Simd>(p: *const Self, n: usize) -> S {
        // SAFETY: as above.
        unsafe { S::load_up_to(p, n) }
    }

    #[inline(always)]
    unsafe fn store_up_to<S: Simd>(x: S, p: *mut Self, n: usize) {
        // SAFETY: as above.
        unsafe { x.store_up_to(p, n) }
    }
}

/// A type of 16 bits, for which vectors have loads and stores of its own.
macro_rules! half_value {
    ($type:ident, $variant:ident, $load:ident, $store:ident) => {
        impl Value for $type {
            const PRECISION: Precision = Precision::$variant;

            fn values(slice: &[Self]) -> Values<'_> {
                Values::$variant(slice)
            }

            fn of_values(values: Values<'_>) -> Option<&[Self]> {
                match values {
                    Values::$variant(slice) => Some(slice),
                    _ => None,
                }
            }

            #[inline(always)]
            unsafe fn load<S: Simd>(p: *const Self) -> S {
                // SAFETY: the caller's promise is the same.
                unsafe { S::$load(p) }
            }

            #[inline(always)]
            unsafe fn store<S: Simd>(x: S, p: *mut Self) {
                // SAFETY: as above.
                unsafe { x.$store(p) }
            }
        }
    };
}

half_value!(bf16, Bf16, load_bf16, store_bf16);
half_value!(f16, F16, load_f16, store_f16);

/// Values of any type.
#[derive(Clone, Copy)]
pub enum Values<'a> {
    /// Float32.
    F32(&'a [f32]),
    /// Bfloat16.
    Bf16(&'a [bf16]),
    /// Float16.
    F16(&'a [f16]),
}

/// Runs `$e` with `$x` bound to the slice that values are.
macro_rules! each_slice {
    ($values:expr, $x:ident => $e:expr) => {
        match $values {
            Values::F32($x) => $e,
            Values::Bf16($x) => $e,
            Values::F16($x) => $e,
        }
    };
}

impl<'a> Values<'a> {
    /// How many.
    pub fn len(&self) -> usize {
        each_slice!(self, x => x.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What they are kept as.
    pub fn precision(&self) -> Precision {
        match self {
            Self::F32(_) => Precision::F32,
            Self::Bf16(_) => Precision::Bf16,
            Self::F16(_) => Precision::F16,
        }
    }

    /// Some of them.
    ///
    /// # Panics
    /// If there are no such.
    pub fn part(self, range: Range<usize>) -> Self {
        each_slice!(self, x => Value::values(&x[range]))
    }

    /// Those from `at` on.
    pub(super) fn from(self, at: usize) -> AnyPtr {
        each_slice!(self, x => AnyPtr::new(x[at..].as_ptr()))
    }
}

impl<'a, V: Value> From<&'a [V]> for Values<'a> {
    fn from(slice: &'a [V]) -> Self {
        V::values(slice)
    }
}

impl<'a, V: Value> From<&'a Vec<V>> for Values<'a> {
    fn from(vec: &'a Vec<V>) -> Self {
        V::values(vec)
    }
}

impl<'a, V: Value, const N: usize> From<&'a [V; N]> for Values<'a> {
    fn from(array: &'a [V; N]) -> Self {
        V::values(array)
    }
}

/// Runs `$e` with the type `$v` of a [`Precision`].
macro_rules! with_type {
    ($precision:expr, $v:ident => $e:expr) => {
        match $precision {
            $crate::kernels::cpu::values::Precision::F32 => {
                type $v = f32;
                $e
            }
            $crate::kernels::cpu::values::Precision::Bf16 => {
                type $v = half::bf16;
                $e
            }
            $crate::kernels::cpu::values::Precision::F16 => {
                type $v = half::f16;
                $e
            }
        }
    };
}
pub(super) use with_type;

/// A pointer to values of any type.
#[derive(Clone, Copy)]
pub(super) struct AnyPtr {
    p: *const u8,
    pub precision: Precision,
}

impl AnyPtr {
    pub fn new<V: Value>(p: *const V) -> Self {
        Self {
            p: p.cast(),
            precision: V::PRECISION,
        }
    }

    /// Null: no values.
    pub fn none(precision: Precision) -> Self {
        Self {
            p: std::ptr::null(),
            precision,
        }
    }

    /// So many values on, inside the allocation or not.
    #[inline(always)]
    pub fn at(self, values: usize) -> Self {
        Self {
            p: self.p.wrapping_add(values * self.precision.bytes()),
            ..self
        }
    }

    /// The address, of values of type `V`.
    #[inline(always)]
    pub fn typed<V: Value>(self) -> *const V {
        debug_assert_eq!(self.precision, V::PRECISION);
        self.p.cast()
    }

    /// The address.
    #[inline(always)]
    pub fn address(self) -> *const u8 {
        self.p
    }

    /// The first value.
    ///
    /// # Safety
    /// It can be read.
    #[inline(always)]
    pub unsafe fn get(self) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { with_type!(self.precision, V => self.typed::<V>().read().widen()) }
    }

    /// # Safety
    /// The machine has the instruction set; a vector of values can be read.
    #[inline(always)]
    pub unsafe fn load<S: Simd>(self) -> S {
        // SAFETY: the caller's promise.
        unsafe { with_type!(self.precision, V => V::load(self.typed::<V>())) }
    }
}

/// A pointer that values of any type are written to. Tasks share it; each writes its own part.
#[derive(Clone, Copy)]
pub(super) struct AnyMut {
    p: *mut u8,
    pub precision: Precision,
}

// SAFETY: it is an address; what tasks do through it, their own unsafe blocks answer for.
unsafe impl Send for AnyMut {}
// SAFETY: as above.
unsafe impl Sync for AnyMut {}

impl AnyMut {
    pub fn new<V: Value>(p: *mut V) -> Self {
        Self {
            p: p.cast(),
            precision: V::PRECISION,
        }
    }

    /// So many values on.
    #[inline(always)]
    pub fn at(self, values: usize) -> Self {
        Self {
            p: self.p.wrapping_add(values * self.precision.bytes()),
            ..self
        }
    }

    /// The address, of values of type `V`.
    #[inline(always)]
    pub fn typed<V: Value>(self) -> *mut V {
        debug_assert_eq!(self.precision, V::PRECISION);
        self.p.cast()
    }
}

isa_fn! {
    /// Reads `n` values as float32.
    ///
    /// # Safety
    /// They can be read at `from`, and there is room at `to`.
    pub(super) fn widen = widen_body(from: AnyPtr, n: usize, to: *mut f32)
}

/// # Safety
/// That of [`widen`], on a machine that has `S`.
#[inline(always)]
unsafe fn widen_body<S: Simd>(from: AnyPtr, n: usize, to: *mut f32) {
    // SAFETY: `n - i` values are left from `i` on.
    unsafe {
        with_type!(from.precision, V => {
            let from = from.typed::<V>();
            for i in (0..n).step_by(S::LANES) {
                V::load_up_to::<S>(from.add(i), n - i).store_up_to(to.add(i), n - i);
            }
        })
    }
}

isa_fn! {
    /// Writes `n` values, rounded.
    ///
    /// # Safety
    /// They can be read at `from`, and there is room at `to`.
    pub(super) fn narrow = narrow_body(from: *const f32, n: usize, to: AnyMut)
}

/// # Safety
/// That of [`narrow`], on a machine that has `S`.
#[inline(always)]
unsafe fn narrow_body<S: Simd>(from: *const f32, n: usize, to: AnyMut) {
    // SAFETY: `n - i` values are left from `i` on.
    unsafe {
        with_type!(to.precision, V => {
            let to = to.typed::<V>();
            for i in (0..n).step_by(S::LANES) {
                V::store_up_to(S::load_up_to(from.add(i), n - i), to.add(i), n - i);
            }
        })
    }
}
