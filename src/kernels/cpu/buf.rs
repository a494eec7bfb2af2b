//! Memory for the kernels: aligned buffers, a pool of scratch that outlives a call, and output vectors on huge pages.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ops::Deref;
use std::sync::{Mutex, PoisonError};

use super::values::{AnyPtr, Precision, Value, Values};

/// From this size on, buffers ask the system for huge pages: faulting in 4 KiB pages one by one costs a convolution
/// over a large map a good part of its time.
const HUGE: usize = 2 << 20;

/// Bytes of scratch kept between calls: what a task of each thread takes at most, or 96 MB for a few of them. Were it less, threads
/// would evict each other's and fill new pages for every task.
fn kept() -> usize {
    const OF_A_THREAD: usize = 12 << 20;
    const LEAST: usize = 96 << 20;
    LEAST.max(OF_A_THREAD * rayon::current_num_threads())
}

/// A fixed-size buffer of numbers, aligned to a cache line (to a huge page where it is large).
///
/// `ptr` is an allocation of `layout(len)` that this value alone owns; once it is out of this module's hands, all `len`
/// values are written.
pub(super) struct Aligned<V: Value = f32> {
    ptr: *mut V,
    len: usize,
}

// SAFETY: it owns its memory, as a boxed slice does.
unsafe impl<V: Value> Send for Aligned<V> {}
// SAFETY: a shared `Aligned` is only read, as a boxed slice is.
unsafe impl<V: Value> Sync for Aligned<V> {}

impl<V: Value> Aligned<V> {
    fn layout(len: usize) -> Layout {
        let bytes = len.max(16) * size_of::<V>();
        let align = if bytes >= HUGE { HUGE } else { 64 };
        Layout::from_size_align(bytes, align).expect("a buffer is smaller than the address space")
    }

    pub fn zeroed(len: usize) -> Self {
        // SAFETY: every value is written, as zero.
        unsafe { Self::filled(len, |to| to.get().write_bytes(0, len)) }
    }

    /// A buffer that `fill` writes through the pointer: large weights are packed by several threads, which so share the work
    /// of bringing in its pages too.
    ///
    /// # Safety
    /// `fill` must write every value.
    pub unsafe fn filled(len: usize, fill: impl FnOnce(Shared<V>)) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { alloc(layout) }.cast::<V>();
        if ptr.is_null() {
            handle_alloc_error(layout);
        }
        advise_huge(ptr, len);
        // Owned from here on: a `fill` that panics leaves nothing behind.
        let buf = Self { ptr, len };
        fill(Shared(ptr));
        buf
    }
}

impl<V: Value> Drop for Aligned<V> {
    fn drop(&mut self) {
        // SAFETY: allocated by `filled` with the same layout, and owned.
        unsafe { dealloc(self.ptr.cast(), Self::layout(self.len)) }
    }
}

impl<V: Value> Deref for Aligned<V> {
    type Target = [V];
    fn deref(&self) -> &[V] {
        // SAFETY: `ptr` points to `len` values, which `filled` had written before it gave the buffer out.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}

static POOL: Mutex<Vec<Aligned>> = Mutex::new(Vec::new());

/// Scratch memory with arbitrary contents; goes back to the pool when dropped.
pub(super) struct Scratch(Option<Aligned>);

impl Scratch {
    /// For at least `len` values.
    pub fn take(len: usize) -> Self {
        let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |b: &Aligned| b.len >= len && b.len <= 4 * len.max(1 << 14);
        let best = (0..pool.len())
            .filter(|&i| fits(&pool[i]))
            .min_by_key(|&i| pool[i].len);
        let buf = best.map(|i| pool.swap_remove(i));
        drop(pool);
        Self(Some(buf.unwrap_or_else(|| {
            Aligned::zeroed(len.next_multiple_of(1 << 14))
        })))
    }

    /// Where its values lie. They may be read and written as long as the scratch lives, which nobody else does.
    pub fn ptr(&mut self) -> *mut f32 {
        self.0.as_ref().map_or(std::ptr::null_mut(), |b| b.ptr)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        pool.extend(self.0.take());
        // The oldest go first, so that sizes no longer in use do not pile up.
        let (count, kept) = (6 * rayon::current_num_threads() + 4, kept());
        while pool.len() > count
            || pool.iter().map(|b| b.len).sum::<usize>() * size_of::<f32>() > kept
        {
            pool.remove(0);
        }
    }
}

/// A pointer that tasks share; each writes its own part.
#[derive(Clone, Copy)]
pub(super) struct Shared<V: Value = f32>(pub *mut V);

// SAFETY: it is an address; what tasks do through it, their own unsafe blocks answer for.
unsafe impl<V: Value> Send for Shared<V> {}
// SAFETY: as above.
unsafe impl<V: Value> Sync for Shared<V> {}

impl<V: Value> Shared<V> {
    /// A method, so that closures capture the whole (`Sync`) struct.
    pub fn get(self) -> *mut V {
        self.0
    }
}

/// Value `at` of a residual and those behind it, null where there is none.
pub(super) fn from_or_null(residual: Option<Values>, at: usize) -> AnyPtr {
    residual.map_or(AnyPtr::none(Precision::F32), |r| r.from(at))
}

/// A vector of `len` values that `fill` writes through the pointer.
///
/// # Safety
/// `fill` must write every value.
pub(super) unsafe fn filled<V: Value>(len: usize, fill: impl FnOnce(Shared<V>)) -> Vec<V> {
    let mut v = Vec::<V>::with_capacity(len);
    advise_huge(v.as_mut_ptr(), len);
    fill(Shared(v.as_mut_ptr()));
    // SAFETY: within the capacity, and written by `fill` as the caller promises.
    unsafe { v.set_len(len) };
    v
}

/// A vector of `len` zeros that are not in memory before they are written, and then on huge pages.
pub fn zeros<V: Value + bytemuck::Zeroable>(len: usize) -> Vec<V> {
    let values: Vec<V> = bytemuck::zeroed_vec(len);
    advise_huge(values.as_ptr().cast_mut(), len);
    values
}

/// Asks for huge pages over the whole ones inside a large new allocation.
fn advise_huge<V>(ptr: *mut V, len: usize) {
    #[cfg(target_os = "linux")]
    {
        let start = (ptr as usize).next_multiple_of(HUGE);
        let end = (ptr as usize + len * size_of::<V>()) / HUGE * HUGE;
        if end > start {
            // SAFETY: advice on how whole pages inside the allocation are backed changes no value in them. A refusal leaves
            // ordinary pages.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (ptr, len);
}
