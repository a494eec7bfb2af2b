//! Work that a card is told of once and does again as one thing: CUDA graphs.

use std::sync::atomic::Ordering;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, result, sys};
use candle_core::{Device, Error, Tensor};

use super::arrays::Array;
use super::card::of_device;

type Result<T, E = Error> = std::result::Result<T, E>;

/// Recorded work. What it reads and writes lies where it lay when it was recorded.
pub struct Graph {
    graph: CudaGraph,
    /// Dropped after the graph, whose memory it gives back.
    _memory: GraphMemory,
    /// Alive as long as the graph may be launched.
    _used: Vec<Tensor>,
}

/// What graphs that are gone had allocated, which the driver keeps for the next one.
struct GraphMemory(sys::CUdevice);

impl Drop for GraphMemory {
    fn drop(&mut self) {
        // SAFETY: the device is one that is open. A driver that cannot keeps the memory, nothing else.
        let _ = unsafe { sys::cuDeviceGraphMemTrim(self.0) };
    }
}

impl Graph {
    /// Records `work`, which is not done, and makes a graph of it. It may allocate and free; it must not wait, copy to or from the
    /// host, or write to memory that it allocates and keeps. `used` is the memory from before that it reads and writes.
    /// None where the driver does not record it, of which nothing remains.
    ///
    /// # Errors
    /// Those of the driver when it begins.
    pub fn record<E>(
        device: &Device,
        used: Vec<Tensor>,
        work: impl FnOnce() -> Result<(), E>,
    ) -> Result<Option<Self>> {
        let card = of_device(device)?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        if card.stream.begin_capture(mode).is_err() {
            return Ok(None);
        }
        card.recording.store(true, Ordering::Relaxed);
        let told = work();
        card.recording.store(false, Ordering::Relaxed);
        let flags = sys::CUgraphInstantiate_flags(0);
        let graph = card.stream.end_capture(flags);
        Ok(match (told, graph) {
            (Ok(()), Ok(Some(graph))) => Some(Self {
                graph,
                _memory: GraphMemory(card.stream.context().cu_device()),
                _used: used,
            }),
            // What could not be recorded can be done: the caller does it as ever.
            _ => None,
        })
    }

    /// Tells the stream to do the work.
    ///
    /// # Errors
    /// The driver refuses, for a lack of memory for one.
    pub fn launch(&self) -> Result<()> {
        self.graph.launch().w()
    }
}

/// Copies the values of a tensor into the memory of another of its size and type, which nobody else may be reading.
///
/// # Errors
/// They are not alike, or the driver refuses.
pub fn copy(from: &Tensor, to: &Tensor) -> Result<()> {
    let card = of_device(from.device())?;
    let (source, target) = (
        Array::contiguous(from, &card)?,
        Array::contiguous(to, &card)?,
    );
    if from.elem_count() != to.elem_count() || source.dtype != target.dtype {
        return Err(Error::Msg(format!(
            "{:?} cannot be copied into {:?}",
            from.shape(),
            to.shape()
        )));
    }
    let bytes = from.elem_count() * source.dtype.size_in_bytes();
    // SAFETY: both are of this card and of so many bytes; the stream keeps the order of what is told.
    unsafe {
        result::memcpy_dtod_async(
            target.pointer,
            source.pointer,
            bytes,
            card.stream.cu_stream(),
        )
    }
    .w()
}
