//! The program's allocator: what large allocations leave is kept for the next of about the same size. The system hands out pages that
//! it has filled with zeros, which for the maps of a network, as large as the caches and written in full, costs an eighth of the time.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Bytes from which on an allocation is kept; smaller ones are the C library's, which reuses them as well.
const LARGE: usize = 128 << 10;
const PAGE: usize = 4096;
/// From this size on allocations begin at a huge page.
const HUGE: usize = 2 << 20;
/// Blocks kept at a time.
const MOST: usize = 96;

/// Whether blocks are kept: not where memory is short.
static KEEPS: AtomicBool = AtomicBool::new(true);
static POOL: Mutex<Pool> = Mutex::new(Pool::new());

/// To be named as `#[global_allocator]`. It never makes the process larger than it has been: together with what is in use, no more is kept
/// than was in use at a time.
pub struct Reuse;

/// Pages of the system's, `len` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    at: usize,
    len: usize,
}

/// Blocks that nobody uses, the oldest first, and how much is in use.
struct Pool {
    kept: [Block; MOST],
    count: usize,
    /// Bytes of them.
    bytes: usize,
    /// Bytes of the blocks that are in use, and the most that they were.
    used: usize,
    most_used: usize,
}

impl Pool {
    const fn new() -> Self {
        Self {
            kept: [Block { at: 0, len: 0 }; MOST],
            count: 0,
            bytes: 0,
            used: 0,
            most_used: 0,
        }
    }

    fn remove(&mut self, index: usize) -> Block {
        let block = self.kept[index];
        self.kept.copy_within(index + 1..self.count, index);
        self.count -= 1;
        self.bytes -= block.len;
        block
    }

    /// A kept block for `len` bytes, at most a quarter larger; it counts as used then, as far as it was asked for.
    fn take(&mut self, len: usize, align: usize) -> Option<Block> {
        let fits = |block: &Block| {
            (len..=len + len / 4).contains(&block.len) && block.at.is_multiple_of(align)
        };
        let best = (0..self.count)
            .filter(|&index| fits(&self.kept[index]))
            .min_by_key(|&index| self.kept[index].len)?;
        let block = self.remove(best);
        self.use_more(len);
        Some(block)
    }

    fn use_more(&mut self, len: usize) {
        self.used += len;
        self.most_used = self.most_used.max(self.used);
    }

    /// The oldest block, where what is used and kept is more than was ever used.
    fn too_much(&mut self) -> Option<Block> {
        let grows = self.used + self.bytes > self.most_used;
        (grows && self.count > 0).then(|| self.remove(0))
    }

    /// Keeps a block that was used; where there is no place, in place of the oldest, which it returns.
    fn keep(&mut self, block: Block) -> Option<Block> {
        let oldest = (self.count == MOST).then(|| self.remove(0));
        self.kept[self.count] = block;
        self.count += 1;
        self.bytes += block.len;
        oldest
    }
}

/// The pool; `change` must not allocate.
fn with_pool<T>(change: impl FnOnce(&mut Pool) -> T) -> T {
    change(&mut POOL.lock().unwrap_or_else(PoisonError::into_inner))
}

/// From here on nothing is kept.
pub(super) fn stop() {
    KEEPS.store(false, Ordering::Relaxed);
    while let Some(block) = with_pool(|pool| (pool.count > 0).then(|| pool.remove(0))) {
        unmap(block);
    }
}

/// Bytes of the pages for a large allocation; None for one that is the system's.
fn pages(layout: &Layout) -> Option<usize> {
    let size = layout.size();
    let aligned = layout.align() <= PAGE || (layout.align() <= HUGE && size >= HUGE);
    (size >= LARGE && aligned)
        .then(|| size.checked_next_multiple_of(PAGE))
        .flatten()
}

/// Fresh pages, all zeros; null where there are none.
fn map(len: usize) -> *mut u8 {
    // A block that is to begin at a huge page is cut out of a longer one.
    let spare = if len >= HUGE { HUGE - PAGE } else { 0 };
    let Some(whole) = len.checked_add(spare) else {
        return std::ptr::null_mut();
    };
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: new pages wherever the system has room for them.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), whole, protection, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return std::ptr::null_mut();
    }
    let start = at as usize;
    let first = if spare > 0 {
        start.next_multiple_of(HUGE)
    } else {
        start
    };
    for (at, end) in [(start, first), (first + len, start + whole)] {
        unmap(Block { at, len: end - at });
    }
    first as *mut u8
}

/// Gives pages back that this allocator alone knows.
fn unmap(block: Block) {
    if block.len > 0 {
        // SAFETY: whole pages that `map` was given and nobody uses. That the system refuses (it has too many parts to remember) loses
        // them, nothing else.
        unsafe { libc::munmap(block.at as *mut libc::c_void, block.len) };
    }
}

/// A block of `len` bytes that nobody uses, of those that are kept or new.
fn obtain(len: usize, align: usize) -> *mut u8 {
    let Some(block) = with_pool(|pool| pool.take(len, align)) else {
        return fresh(len);
    };
    unmap(Block {
        at: block.at + len,
        len: block.len - len,
    });
    block.at as *mut u8
}

/// New pages of `len` bytes, in place of older ones that are kept where there would be too many.
fn fresh(len: usize) -> *mut u8 {
    with_pool(|pool| pool.use_more(len));
    drop_too_much();
    let at = map(len);
    if at.is_null() {
        with_pool(|pool| pool.used -= len);
    }
    at
}

fn drop_too_much() {
    while let Some(block) = with_pool(Pool::too_much) {
        unmap(block);
    }
}

/// Takes back a block that was in use.
fn recover(block: Block) {
    let keeps = KEEPS.load(Ordering::Relaxed);
    let dropped = with_pool(|pool| {
        pool.used -= block.len;
        if keeps { pool.keep(block) } else { Some(block) }
    });
    if let Some(block) = dropped {
        unmap(block);
    }
}

/// A used block of `len` bytes as one of `new`, its pages moved where it cannot grow. None, and nothing done, where the system does not do
/// that: it has no more, or keeps parts of the block apart, some on huge pages and some not.
fn resized(at: *mut u8, len: usize, new: usize) -> Option<*mut u8> {
    // SAFETY: the block is this caller's own, `len` bytes of pages that `map` was given.
    let moved = unsafe { libc::mremap(at.cast(), len, new, libc::MREMAP_MAYMOVE) };
    if moved == libc::MAP_FAILED {
        return None;
    }
    with_pool(|pool| {
        pool.used -= len;
        pool.use_more(new);
    });
    drop_too_much();
    Some(moved.cast())
}

// SAFETY: what `pages` takes for large are blocks of whole pages that the pool hands to one user at a time, as long as was asked for,
// and aligned: pages are, new blocks from HUGE on are to that, and kept ones are asked. It depends on the layout alone, so that all
// ways of an allocation agree on it. All else is the system's.
unsafe impl GlobalAlloc for Reuse {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match pages(&layout) {
            Some(len) => obtain(len, layout.align()),
            // SAFETY: the caller's promise is the same.
            None => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match pages(&layout) {
            // Not a kept block: zeros that nobody writes are never in memory.
            Some(len) => fresh(len),
            // SAFETY: the caller's promise is the same.
            None => unsafe { System.alloc_zeroed(layout) },
        }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        match pages(&layout) {
            Some(len) => recover(Block {
                at: ptr as usize,
                len,
            }),
            // SAFETY: the caller's promise is the same.
            None => unsafe { System.dealloc(ptr, layout) },
        }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller promises a size that is one of a layout.
        let new = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        let moved = match (pages(&layout), pages(&new)) {
            // SAFETY: the caller's promise is the same.
            (None, None) => return unsafe { System.realloc(ptr, layout, new_size) },
            (Some(len), Some(wanted)) if layout.align() <= PAGE => resized(ptr, len, wanted),
            _ => None,
        };
        // SAFETY: the old block is the caller's, and the new one no shorter than what is copied.
        moved.unwrap_or_else(|| unsafe {
            let to = self.alloc(new);
            if !to.is_null() {
                to.copy_from_nonoverlapping(ptr, layout.size().min(new_size));
                self.dealloc(ptr, layout);
            }
            to
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: usize = 1 << 20;

    fn layout(size: usize, align: usize) -> Layout {
        Layout::from_size_align(size, align).unwrap()
    }

    #[test]
    fn a_block_goes_to_the_next_of_about_its_size() {
        let mut pool = Pool::new();
        pool.use_more(10 * MB);
        pool.used -= 10 * MB;
        let block = Block {
            at: 4 * MB + PAGE,
            len: 10 * MB,
        };
        assert_eq!(pool.keep(block), None);
        assert_eq!(pool.take(7 * MB, 64), None, "more than a quarter too large");
        assert_eq!(pool.take(11 * MB, 64), None, "too small");
        assert_eq!(pool.take(9 * MB, HUGE), None, "not at a huge page");
        assert_eq!(pool.take(9 * MB, 64), Some(block));
        assert_eq!((pool.count, pool.bytes, pool.used), (0, 0, 9 * MB));
    }

    #[test]
    fn no_more_is_kept_than_was_used_at_a_time() {
        let mut pool = Pool::new();
        let block = |i: usize| Block {
            at: i * HUGE,
            len: MB,
        };
        pool.use_more(8 * MB);
        for i in 0..5 {
            pool.used -= MB;
            assert_eq!(pool.keep(block(i)), None);
        }
        assert_eq!(pool.too_much(), None);
        pool.use_more(2 * MB);
        assert_eq!(pool.too_much(), Some(block(0)), "the oldest goes first");
        assert_eq!(pool.too_much(), Some(block(1)));
        assert_eq!(pool.too_much(), None);
        assert_eq!(pool.used + pool.bytes, pool.most_used);
    }

    #[test]
    fn where_there_is_no_place_the_oldest_goes() {
        let mut pool = Pool::new();
        let block = |i: usize| Block {
            at: i * HUGE,
            len: PAGE,
        };
        for i in 0..MOST {
            assert_eq!(pool.keep(block(i)), None);
        }
        assert_eq!(pool.keep(block(MOST)), Some(block(0)));
    }

    #[test]
    fn allocations_hold_what_is_written_through_every_change_of_size() {
        for align in [1, 64, PAGE, HUGE] {
            let mut at = std::ptr::null_mut();
            let sizes = [
                100,
                LARGE - 1,
                LARGE,
                3 * MB + 7,
                9 * MB,
                2 * MB,
                LARGE + PAGE,
                50,
            ];
            let mut size = sizes[0];
            for (i, &new) in sizes.iter().enumerate() {
                // SAFETY: the block is one of `size` bytes that was made with this layout, of which what was written is read.
                unsafe {
                    at = if i == 0 {
                        Reuse.alloc(layout(new, align))
                    } else {
                        Reuse.realloc(at, layout(size, align), new)
                    };
                    assert!(
                        !at.is_null() && (at as usize).is_multiple_of(align),
                        "{new} at {align}"
                    );
                    let first = std::slice::from_raw_parts_mut(at, 50);
                    if i > 0 {
                        assert!(first.iter().all(|&x| x == i as u8), "{new} at {align}");
                    }
                    at.add(new - 1).write(0);
                    first.fill(i as u8 + 1);
                }
                size = new;
            }
            // SAFETY: of this layout, and no longer used.
            unsafe { Reuse.dealloc(at, layout(size, align)) };
        }
    }

    #[test]
    fn zeros_are_zeros_though_a_block_was_written() {
        let layout = layout(3 * MB, 64);
        for _ in 0..3 {
            // SAFETY: one block after the other, inside its size.
            unsafe {
                let at = Reuse.alloc(layout);
                at.write_bytes(7, layout.size());
                Reuse.dealloc(at, layout);
                let zeros = Reuse.alloc_zeroed(layout);
                let values = std::slice::from_raw_parts(zeros, layout.size());
                assert!(values.iter().all(|&x| x == 0));
                Reuse.dealloc(zeros, layout);
            }
        }
    }
}
