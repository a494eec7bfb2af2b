//! A bound on the heap, kept by the allocator: an input that passes it is a finding, as a hang is. (libFuzzer's own
//! bound on allocations needs a sanitizer, which stable Rust has not.)

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Far above what the targets' inputs and limits should take, far below what hurts.
const MOST: usize = 512 << 20;

/// The system's allocator, which ends the process where more than [`MOST`] bytes are held.
pub struct Bounded;

static HELD: AtomicUsize = AtomicUsize::new(0);

fn take(size: usize) {
    if HELD.fetch_add(size, Relaxed) + size > MOST {
        HELD.store(0, Relaxed); // what reports this may allocate
        eprintln!("out of bounds: {size} bytes more, which makes over {MOST}");
        std::process::abort();
    }
}

fn give(size: usize) {
    let _ = HELD.fetch_update(Relaxed, Relaxed, |held| Some(held.saturating_sub(size)));
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        give(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        take(size);
        give(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, size) }
    }
}
