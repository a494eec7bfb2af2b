//! Memory for the kernels: aligned buffers, a pool of scratch that outlives a call, and output vectors on huge pages.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

/// From this size on, buffers ask the system for huge pages: faulting in 4 KiB pages one by one costs a convolution
/// over a large map a good part of its time.
const HUGE: usize = 2 << 20;

/// Values of scratch kept between calls: 96 MB.
const KEPT: usize = 24 << 20;

/// A fixed-size buffer of f32, aligned to a cache line (to a huge page where it is large).
pub(super) struct Aligned {
    ptr: *mut f32,
    len: usize,
}

// SAFETY: an `Aligned` owns its memory as a boxed slice does.
unsafe impl Send for Aligned {}
unsafe impl Sync for Aligned {}

impl Aligned {
    fn layout(len: usize) -> Layout {
        let bytes = len.max(16) * size_of::<f32>();
        let align = if bytes >= HUGE { HUGE } else { 64 };
        Layout::from_size_align(bytes, align).expect("a buffer is smaller than the address space")
    }

    pub fn zeroed(len: usize) -> Self {
        // SAFETY: zeroed before anybody sees it.
        unsafe {
            let mut buf = Self::unwritten(len);
            buf.as_mut_ptr().write_bytes(0, len);
            buf
        }
    }

    /// Memory that is yet to be written, and only then exists: large weights are packed by several threads, which
    /// so share the work of bringing in its pages too.
    ///
    /// # Safety
    /// Every value must be written before it is read.
    pub unsafe fn unwritten(len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { alloc(layout) }.cast::<f32>();
        if ptr.is_null() {
            handle_alloc_error(layout);
        }
        advise_huge(ptr, len);
        Self { ptr, len }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated by `unwritten` with the same layout.
        unsafe { dealloc(self.ptr.cast(), Self::layout(self.len)) }
    }
}

impl Deref for Aligned {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: `len` initialised values, owned.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

static POOL: Mutex<Vec<Aligned>> = Mutex::new(Vec::new());

/// Scratch memory with arbitrary contents; goes back to the pool when dropped.
pub(super) struct Scratch(Option<Aligned>);

impl Scratch {
    pub fn take(len: usize) -> Self {
        let mut pool = POOL.lock().unwrap_or_else(|e| e.into_inner());
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

    pub fn ptr(&mut self) -> *mut f32 {
        self.0
            .as_mut()
            .map_or(std::ptr::null_mut(), |b| b.as_mut_ptr())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let mut pool = POOL.lock().unwrap_or_else(|e| e.into_inner());
        pool.extend(self.0.take());
        // The oldest go first, so that sizes no longer in use do not pile up.
        let count = 6 * rayon::current_num_threads() + 4;
        while pool.len() > count || pool.iter().map(|b| b.len).sum::<usize>() > KEPT {
            pool.remove(0);
        }
    }
}

/// Frees the scratch memory kept between calls.
pub fn release_scratch() {
    POOL.lock().unwrap_or_else(|e| e.into_inner()).clear();
}

/// A pointer that tasks share; each writes its own part.
#[derive(Clone, Copy)]
pub(super) struct Shared(pub *mut f32);

// SAFETY: the kernels hand each task a disjoint part of what it points to.
unsafe impl Send for Shared {}
unsafe impl Sync for Shared {}

impl Shared {
    /// A method, so that closures capture the whole (`Sync`) struct.
    pub fn get(self) -> *mut f32 {
        self.0
    }

    /// `n` values on; null stays null.
    pub fn offset_or_null(self, n: usize) -> *const f32 {
        if self.0.is_null() {
            self.0
        } else {
            self.0.wrapping_add(n)
        }
    }
}

/// A vector of `len` values that `fill` writes through the pointer.
///
/// # Safety
/// `fill` must write every value.
pub(super) unsafe fn filled(len: usize, fill: impl FnOnce(Shared)) -> Vec<f32> {
    let mut v = Vec::<f32>::with_capacity(len);
    advise_huge(v.as_mut_ptr(), len);
    fill(Shared(v.as_mut_ptr()));
    // SAFETY: within the capacity, and written by `fill` as the caller promises.
    unsafe { v.set_len(len) };
    v
}

/// Asks for huge pages over the whole ones inside a large new allocation.
fn advise_huge(ptr: *mut f32, len: usize) {
    #[cfg(target_os = "linux")]
    {
        let start = (ptr as usize).next_multiple_of(HUGE);
        let end = (ptr as usize + len * size_of::<f32>()) / HUGE * HUGE;
        if end > start {
            // SAFETY: only advice, over memory that the vector owns. A refusal leaves ordinary pages.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (ptr, len);
}
