//! What a card keeps between calls: its kernels, and memory that every call may use.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, DevicePtr, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::{CudaDevice, DeviceId, WrapErr};
use candle_core::{DType, Error, Result};

/// PTX of one source file for cards of one capability and newer ones.
struct Module {
    name: &'static str,
    /// 75, 80, …
    capability: u32,
    ptx: &'static str,
}

/// What build.rs compiled.
const MODULES: &[Module] = include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// Counters of the group norm's kernel, one a row of the batch.
const TICKETS: usize = 1 << 12;

/// What a kernel is launched with: anything that is passed by value.
pub use candle_core::cuda_backend::cudarc::driver::DeviceRepr as Argument;

/// A CUDA card in use.
pub struct Card {
    pub device: CudaDevice,
    pub stream: Arc<CudaStream>,
    /// 75, 80, …
    pub capability: u32,
    functions: Mutex<HashMap<String, CudaFunction>>,
    /// Used by a call and then by the next: the stream keeps them apart.
    scratch: Mutex<Option<CudaSlice<u8>>>,
    /// Zeros between calls.
    tickets: CudaSlice<u32>,
    notes: Mutex<Vec<String>>,
    /// Whether what the stream is told is recorded in place of done.
    pub recording: AtomicBool,
}

/// A lock's content, also where a thread that held it has panicked: nothing here is left half done.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One of something for every card in use.
pub struct PerCard<T>(Mutex<Vec<(DeviceId, Arc<T>)>>);

impl<T> PerCard<T> {
    pub const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// The one of `device`, if it was made.
    pub fn found(&self, device: &CudaDevice) -> Option<Arc<T>> {
        Self::find(&locked(&self.0), device)
    }

    /// The one of `device`, made at the first call.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn of(&self, device: &CudaDevice, make: impl FnOnce() -> Result<T>) -> Result<Arc<T>> {
        let mut all = locked(&self.0);
        if let Some(found) = Self::find(&all, device) {
            return Ok(found);
        }
        let made = Arc::new(make()?);
        all.push((device.id(), made.clone()));
        Ok(made)
    }

    fn find(all: &[(DeviceId, Arc<T>)], device: &CudaDevice) -> Option<Arc<T>> {
        let found = all.iter().find(|(id, _)| *id == device.id());
        found.map(|(_, one)| one.clone())
    }
}

static CARDS: PerCard<Card> = PerCard::new();

impl Card {
    /// What is kept for `device`; made at the first call.
    ///
    /// # Errors
    /// Out of memory.
    pub fn of(device: &CudaDevice) -> Result<Arc<Self>> {
        CARDS.of(device, || Self::new(device))
    }

    fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let (major, minor) = stream.context().compute_capability().w()?;
        Ok(Self {
            capability: (10 * major + minor).unsigned_abs(),
            tickets: device.alloc_zeros::<u32>(TICKETS)?,
            device: device.clone(),
            stream,
            functions: Mutex::default(),
            scratch: Mutex::default(),
            notes: Mutex::default(),
            recording: AtomicBool::new(false),
        })
    }

    /// A kernel of module `module`.
    ///
    /// # Errors
    /// The card is older than every PTX of this build.
    fn function(&self, module: &str, name: &str) -> Result<CudaFunction> {
        let mut functions = locked(&self.functions);
        if let Some(function) = functions.get(name) {
            return Ok(function.clone());
        }
        let fits = MODULES
            .iter()
            .filter(|found| found.name == module && found.capability <= self.capability);
        let newest = fits.max_by_key(|found| found.capability).ok_or_else(|| {
            Error::Msg(format!(
                "the card is of compute capability {}.{}; this build has no kernels for it (CUDA_COMPUTE_CAP)",
                self.capability / 10,
                self.capability % 10
            ))
        })?;
        let function = self
            .device
            .get_or_load_custom_func(name, module, newest.ptx)?
            .into_cuda_function();
        functions.insert(name.to_string(), function.clone());
        Ok(function)
    }

    /// Launches kernel `name` of module `module` on blocks of `threads`.
    ///
    /// # Safety
    /// The arguments are those of the kernel, in number, order and type, and the memory that its pointers stand for is of
    /// this card, as large as the kernel's comment says, and alive until the stream has passed.
    ///
    /// # Errors
    /// The driver refuses.
    pub unsafe fn launch(
        &self,
        (module, name): (&str, &str),
        grid: (u32, u32, u32),
        threads: u32,
        arguments: &[&dyn AsArgument],
    ) -> Result<()> {
        let function = self.function(module, name)?;
        let mut launch = self.stream.launch_builder(&function);
        for argument in arguments {
            argument.push(&mut launch);
        }
        let config = LaunchConfig {
            grid_dim: grid,
            block_dim: (threads, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the caller's promise.
        unsafe { launch.launch(config) }.w()?;
        Ok(())
    }

    /// `bytes` of memory, at a multiple of 256, for the calls that are made before the next one asks. What another call left
    /// in it is still there.
    ///
    /// # Errors
    /// Out of memory.
    pub fn scratch(&self, bytes: usize) -> Result<u64> {
        let mut kept = locked(&self.scratch);
        let large_enough = kept.as_ref().is_some_and(|kept| kept.len() >= bytes);
        if !large_enough {
            if self.recording.load(Ordering::Relaxed) {
                return Err(Error::Msg(
                    "scratch memory cannot grow within a graph, whose it would be".into(),
                ));
            }
            // The old one goes back in the stream's order: work told before still has it.
            *kept = None;
            // SAFETY: nobody reads what was not written: every user of scratch memory writes it first.
            *kept = Some(unsafe { self.device.alloc::<u8>(bytes.next_multiple_of(1 << 20)) }?);
        }
        Ok(kept.as_ref().map_or(0, |kept| self.pointer(kept)))
    }

    /// Zeros, one for each of `rows`, which a kernel leaves as it found them.
    ///
    /// # Errors
    /// There are more rows than anyone has memory for.
    pub fn tickets(&self, rows: usize) -> Result<u64> {
        if rows > TICKETS {
            return Err(Error::Msg(format!(
                "a batch of {rows} maps; at most {TICKETS} are normalised at once: give fewer pictures at a time"
            )));
        }
        Ok(self.pointer(&self.tickets))
    }

    /// Where device memory lies.
    pub fn pointer<T>(&self, slice: &CudaSlice<T>) -> u64 {
        slice.device_ptr(&self.stream).0
    }

    /// Tells, once, of something that only a curious user wants to know.
    pub fn note(&self, text: String) {
        let mut notes = locked(&self.notes);
        if !notes.contains(&text) {
            notes.push(text);
        }
    }

    /// What was noted so far of a device; nothing where it was not used.
    pub fn notes_of(device: &CudaDevice) -> Vec<String> {
        CARDS
            .found(device)
            .map_or_else(Vec::new, |card| locked(&card.notes).clone())
    }

    /// # Errors
    /// `dtype` is bfloat16 and the card is too old for it.
    pub fn takes(&self, dtype: DType) -> Result<()> {
        if dtype == DType::BF16 && self.capability < 80 {
            return Err(Error::Msg(format!(
                "bfloat16 needs a card of compute capability 8.0, this one has {}.{}: use --dtype f16 or f32",
                self.capability / 10,
                self.capability % 10
            )));
        }
        Ok(())
    }
}

/// Something that a kernel takes by value.
pub trait AsArgument {
    /// Adds it to a launch.
    fn push<'a>(&'a self, launch: &mut candle_core::cuda_backend::cudarc::driver::LaunchArgs<'a>);
}

impl<T: Argument> AsArgument for T {
    fn push<'a>(&'a self, launch: &mut candle_core::cuda_backend::cudarc::driver::LaunchArgs<'a>) {
        launch.arg(self);
    }
}

/// The device of a tensor, which the CUDA kernels were given.
pub fn of_device(device: &candle_core::Device) -> Result<Arc<Card>> {
    Card::of(device.as_cuda_device()?)
}
