//! The binary's allocator: the system's, with large blocks kept for the next layer that wants one of their size.
//!
//! A network's maps come in a few sizes, each of many megabytes. The system gives such blocks back at once and
//! hands them out zeroed again, page by page: a third of the time of a denoising step.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;

/// Blocks from here on are kept...
const SMALLEST: usize = 1 << 20;
/// ...up to here: the decoder's largest maps would be a burden to keep.
const LARGEST: usize = 128 << 20;
/// Sizes are rounded up to this, so that few differ.
const GRAIN: usize = 1 << 16;
/// Kept at most, in bytes and in blocks.
const KEPT_BYTES: usize = 256 << 20;
const KEPT_BLOCKS: usize = 64;

pub struct Pool {
    kept: Mutex<Kept>,
}

struct Kept {
    /// Address and size, the oldest first.
    blocks: [(usize, usize); KEPT_BLOCKS],
    count: usize,
    bytes: usize,
}

impl Kept {
    fn take(&mut self, size: usize) -> Option<usize> {
        let found = (0..self.count).rfind(|&i| self.blocks[i].1 == size)?;
        Some(self.remove(found).0)
    }

    fn remove(&mut self, index: usize) -> (usize, usize) {
        let block = self.blocks[index];
        self.blocks.copy_within(index + 1..self.count, index);
        self.count -= 1;
        self.bytes -= block.1;
        block
    }
}

impl Pool {
    pub const fn new() -> Self {
        Self {
            kept: Mutex::new(Kept {
                blocks: [(0, 0); KEPT_BLOCKS],
                count: 0,
                bytes: 0,
            }),
        }
    }
}

/// The layout of a block that is kept, or `None` for one that goes straight to the system.
fn pooled(layout: Layout) -> Option<Layout> {
    let fits = (SMALLEST..=LARGEST).contains(&layout.size()) && layout.align() <= 64;
    let size = layout.size().next_multiple_of(GRAIN);
    // 64 serves every vector; one alignment for all lets any block serve any request of its size.
    fits.then(|| Layout::from_size_align(size, 64).ok()).flatten()
}

// SAFETY: every block comes from the system with the layout that `pooled` derives from the request alone, so that it goes
// back with the same; a kept block is in nobody's hands.
unsafe impl GlobalAlloc for Pool {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(block) = pooled(layout) else {
            return unsafe { System.alloc(layout) };
        };
        let kept = self.kept.lock().ok().and_then(|mut kept| kept.take(block.size()));
        match kept {
            Some(address) => address as *mut u8,
            None => unsafe { System.alloc(block) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match pooled(layout) {
            // The system's fresh pages are zero already.
            Some(block) => unsafe { System.alloc_zeroed(block) },
            None => unsafe { System.alloc_zeroed(layout) },
        }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        let Some(block) = pooled(layout) else {
            return unsafe { System.dealloc(pointer, layout) };
        };
        let mut pointer = pointer;
        let mut size = block.size();
        if let Ok(mut kept) = self.kept.lock() {
            // Room is made for one block by letting the oldest go.
            let full = kept.count == KEPT_BLOCKS || kept.bytes + size > KEPT_BYTES;
            let oldest = (full && kept.count > 0).then(|| kept.remove(0));
            if kept.count < KEPT_BLOCKS && kept.bytes + size <= KEPT_BYTES {
                let index = kept.count;
                kept.blocks[index] = (pointer as usize, size);
                kept.count += 1;
                kept.bytes += size;
                match oldest {
                    Some((address, old)) => (pointer, size) = (address as *mut u8, old),
                    None => return,
                }
            } else if let Some((address, old)) = oldest {
                let block = Layout::from_size_align(old, 64);
                if let Ok(block) = block {
                    unsafe { System.dealloc(address as *mut u8, block) };
                }
            }
        }
        if let Ok(block) = Layout::from_size_align(size, 64) {
            unsafe { System.dealloc(pointer, block) };
        }
    }
}
