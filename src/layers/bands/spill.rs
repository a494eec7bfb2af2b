//! A temporary file for maps that do not fit in memory. It has no name from the start where the system allows that, so
//! that nothing is left of it however the process ends.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::super::{FeatureMap, cpu};
use super::Band;
use crate::device::Backend;

/// Where a band lies in the file, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    offset: u64,
    length: u64,
}

/// Bytes that one thread reads or writes at a time.
const PIECE: usize = 8 << 20;

/// The file, and which parts of it are free.
pub struct SpillFile {
    file: File,
    folder: PathBuf,
    /// In the order of their offsets; no two touch.
    free: Vec<Place>,
    end: u64,
}

impl SpillFile {
    /// In `folder`, or the system's for temporary files.
    ///
    /// # Errors
    /// No file can be made there.
    pub fn create(folder: Option<&Path>) -> Result<Self> {
        let folder = folder.map_or_else(std::env::temp_dir, Path::to_path_buf);
        let file = tempfile::tempfile_in(&folder)
            .with_context(|| format!("cannot make a temporary file in {}", folder.display()))?;
        Ok(Self {
            file,
            folder,
            free: Vec::new(),
            end: 0,
        })
    }

    /// Writes a tensor's values as they are in memory.
    ///
    /// # Errors
    /// The disk is full, or fails.
    pub fn write(&mut self, tensor: &Tensor) -> Result<Place> {
        let place = self.take((tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64);
        cpu::with_bytes(tensor, |bytes| self.write_to(&place, bytes))?;
        Ok(place)
    }

    fn write_to(&self, place: &Place, bytes: &[u8]) -> Result<()> {
        let pieces = bytes.par_chunks(PIECE).enumerate();
        let written = pieces.try_for_each(|(i, bytes)| {
            write_at(&self.file, bytes, place.offset + (i * PIECE) as u64)
        });
        written.with_context(|| {
            format!(
                "cannot keep a map in a temporary file in {} (is the disk full?); --temp-dir names another folder",
                self.folder.display()
            )
        })
    }

    /// Reads some of the lines of a band of `shape` (b, lines, w, c).
    ///
    /// # Errors
    /// The disk fails.
    pub fn read(
        &self,
        place: &Place,
        shape: &[usize],
        lines: Band,
        dtype: DType,
        backend: Backend,
    ) -> Result<FeatureMap> {
        let line = shape[2] * shape[3] * dtype.size_in_bytes();
        let (height, of_item) = (shape[1], lines.len() * line);
        let of_lines = (shape[0], lines.len(), shape[2], shape[3]);
        let tensor = cpu::from_bytes(of_lines, dtype, |bytes| {
            for (item, bytes) in bytes.chunks_exact_mut(of_item).enumerate() {
                let at = (item * height + lines.start) * line;
                read_at(&self.file, bytes, place.offset + at as u64).with_context(|| {
                    format!("cannot read a temporary file in {}", self.folder.display())
                })?;
            }
            Ok(())
        })?;
        Ok(FeatureMap { tensor, backend })
    }

    /// The first free part that is large enough, or the end.
    fn take(&mut self, length: u64) -> Place {
        if let Some(at) = self.free.iter().position(|free| free.length >= length) {
            let free = &mut self.free[at];
            let place = Place {
                offset: free.offset,
                length,
            };
            free.offset += length;
            free.length -= length;
            if free.length == 0 {
                self.free.remove(at);
            }
            return place;
        }
        // The last free part, where it reaches to the end, is the beginning.
        let offset = match self.free.last() {
            Some(last) if last.offset + last.length == self.end => {
                let offset = last.offset;
                self.free.pop();
                offset
            }
            _ => self.end,
        };
        self.end = offset + length;
        Place { offset, length }
    }

    /// The place may be written over.
    pub fn free(&mut self, place: &Place) {
        forget(&self.file, place);
        let at = self.free.partition_point(|free| free.offset < place.offset);
        self.free.insert(at, place.clone());
        let joins = |free: &[Place], at: usize| {
            at + 1 < free.len() && free[at].offset + free[at].length == free[at + 1].offset
        };
        if joins(&self.free, at) {
            self.free[at].length += self.free.remove(at + 1).length;
        }
        if at > 0 && joins(&self.free, at - 1) {
            self.free[at - 1].length += self.free.remove(at).length;
        }
    }
}

#[cfg(unix)]
fn write_at(file: &File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(unix)]
fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

#[cfg(not(unix))]
fn write_at(mut file: &File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    use std::io::{Seek, SeekFrom, Write};
    file.seek(SeekFrom::Start(offset))?;
    file.write_all(bytes)
}

#[cfg(not(unix))]
fn read_at(mut file: &File, bytes: &mut [u8], offset: u64) -> std::io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(bytes)
}

/// Lets the system forget what nobody will read again: what is not on the disk yet is then never written to it.
fn forget(file: &File, place: &Place) {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        const HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (offset, length) = (place.offset as libc::off_t, place.length as libc::off_t);
        // SAFETY: the file is open, and nobody reads this part of it before it is written again. File systems that cannot do it
        // refuse, which costs nothing but space.
        unsafe { libc::fallocate(file.as_raw_fd(), HOLE, offset, length) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, place);
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn what_is_freed_is_used_again_and_neighbours_join() {
        let mut file = SpillFile::create(None).unwrap();
        let places: Vec<Place> = [100, 50, 70].map(|length| file.take(length)).to_vec();
        assert_eq!(file.end, 220);
        file.free(&places[0]);
        file.free(&places[1]);
        assert_eq!(
            file.free,
            [Place {
                offset: 0,
                length: 150
            }]
        );
        assert_eq!(file.take(120).offset, 0);
        assert_eq!(file.take(40).offset, 220);
        file.free(&Place {
            offset: 220,
            length: 40,
        });
        // It reaches to the end, so that more than it has room for begins there.
        assert_eq!(file.take(1000).offset, 220);
        assert_eq!(file.take(30).offset, 120);
        assert!(file.free.is_empty());
        file.free(&places[2]);
        assert_eq!(file.take(70).offset, 150);
    }

    #[test]
    fn lines_come_back_as_they_were() {
        let mut file = SpillFile::create(None).unwrap();
        let values: Vec<f32> = (0..2 * 6 * 3 * 5).map(|i| i as f32 * 0.37).collect();
        let tensor = Tensor::from_vec(values, (2, 6, 3, 5), &Device::Cpu).unwrap();
        file.write(&Tensor::zeros((1, 1, 1, 7), DType::F32, &Device::Cpu).unwrap())
            .unwrap();
        let place = file.write(&tensor).unwrap();
        let lines = file.read(&place, &[2, 6, 3, 5], 2..5, DType::F32, Backend::CpuKernels);
        let want = tensor.narrow(1, 2, 3).unwrap();
        let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(flat(&lines.unwrap().tensor), flat(&want));
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let error = SpillFile::create(Some(Path::new("/not/there")))
            .err()
            .unwrap();
        assert!(format!("{error:#}").contains("/not/there"), "{error:#}");
    }
}
