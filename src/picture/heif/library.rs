//! libheif, opened when the first HEIC or AVIF is to be read: machines without it need nothing of it.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::{null, null_mut};
use std::slice;
use std::sync::OnceLock;

use anyhow::{Result, anyhow, bail, ensure};
use libloading::Library;

/// Names of the library, of which the first that is there is opened.
const NAMES: &[&str] = if cfg!(windows) {
    &["heif.dll", "libheif.dll"]
} else if cfg!(target_os = "macos") {
    &[
        "libheif.1.dylib",
        "/opt/homebrew/lib/libheif.1.dylib",
        "/usr/local/lib/libheif.1.dylib",
    ]
} else {
    &["libheif.so.1"]
};

/// Of its header `heif.h`, versions 1.12 and newer: interleaved RGB, and with alpha, of 8 bits and of 16 with the low byte first.
const RGB: c_int = 1;
const INTERLEAVED: c_int = 10;
const CHROMA_RGB: c_int = 10;
const CHROMA_RGBA: c_int = 11;
const CHROMA_RRGGBB_LE: c_int = 14;
const CHROMA_RRGGBBAA_LE: c_int = 15;
/// A profile that is ICC's, and a restricted one; and one stated by numbers.
const PROFILE_RICC: u32 = u32::from_be_bytes(*b"rICC");
const PROFILE_PROF: u32 = u32::from_be_bytes(*b"prof");

/// `struct heif_error`.
#[repr(C)]
struct Error {
    code: c_int,
    subcode: c_int,
    message: *const c_char,
}

/// The beginning of `struct heif_color_profile_nclx`, version 1.
#[repr(C)]
struct Nclx {
    version: u8,
    primaries: c_int,
    transfer: c_int,
    matrix: c_int,
    full_range: u8,
}

/// Things of the library's own.
type Context = c_void;
type Handle = c_void;
type Image = c_void;

macro_rules! functions {
    ($($name:ident: fn($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// What is called of it.
        #[allow(non_snake_case, reason = "the library's names")]
        struct Functions {
            $($name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            _library: Library,
        }

        impl Functions {
            /// # Errors
            /// It lacks one of them.
            fn of(library: Library) -> Result<Self, libloading::Error> {
                // SAFETY: the types are those of heif.h, which the library keeps for its major version 1, and they are called only as
                // long as it is open.
                unsafe {
                    Ok(Self {
                        $($name: *library.get(concat!("heif_", stringify!($name), "\0").as_bytes())?,)*
                        _library: library,
                    })
                }
            }
        }
    };
}

functions! {
    context_alloc: fn() -> *mut Context;
    context_free: fn(*mut Context);
    context_read_from_memory_without_copy: fn(*mut Context, *const c_void, usize, *const c_void) -> Error;
    context_get_number_of_top_level_images: fn(*mut Context) -> c_int;
    context_get_primary_image_handle: fn(*mut Context, *mut *mut Handle) -> Error;
    image_handle_release: fn(*const Handle);
    image_handle_get_width: fn(*const Handle) -> c_int;
    image_handle_get_height: fn(*const Handle) -> c_int;
    image_handle_has_alpha_channel: fn(*const Handle) -> c_int;
    image_handle_is_premultiplied_alpha: fn(*const Handle) -> c_int;
    image_handle_get_luma_bits_per_pixel: fn(*const Handle) -> c_int;
    image_handle_get_number_of_metadata_blocks: fn(*const Handle, *const c_char) -> c_int;
    image_handle_get_list_of_metadata_block_IDs: fn(*const Handle, *const c_char, *mut u32, c_int) -> c_int;
    image_handle_get_metadata_type: fn(*const Handle, u32) -> *const c_char;
    image_handle_get_metadata_content_type: fn(*const Handle, u32) -> *const c_char;
    image_handle_get_metadata_size: fn(*const Handle, u32) -> usize;
    image_handle_get_metadata: fn(*const Handle, u32, *mut c_void) -> Error;
    image_handle_get_color_profile_type: fn(*const Handle) -> u32;
    image_handle_get_raw_color_profile_size: fn(*const Handle) -> usize;
    image_handle_get_raw_color_profile: fn(*const Handle, *mut c_void) -> Error;
    image_handle_get_nclx_color_profile: fn(*const Handle, *mut *mut Nclx) -> Error;
    nclx_color_profile_free: fn(*mut Nclx);
    decode_image: fn(*const Handle, *mut *mut Image, c_int, c_int, *const c_void) -> Error;
    image_get_width: fn(*const Image, c_int) -> c_int;
    image_get_height: fn(*const Image, c_int) -> c_int;
    image_get_bits_per_pixel_range: fn(*const Image, c_int) -> c_int;
    image_get_plane_readonly: fn(*const Image, c_int, *mut c_int) -> *const u8;
    image_release: fn(*const Image);
}

/// The library, where this machine has it.
fn functions() -> Option<&'static Functions> {
    static FUNCTIONS: OnceLock<Option<Functions>> = OnceLock::new();
    let open = || {
        NAMES.iter().find_map(|name| {
            // SAFETY: libheif runs nothing when it is opened that is not its own to run.
            let library = unsafe { Library::new(*name) }.ok()?;
            Functions::of(library).ok()
        })
    };
    FUNCTIONS.get_or_init(open).as_ref()
}

/// Whether it is there.
pub fn is_here() -> bool {
    functions().is_some()
}

/// # Errors
/// It says so.
fn checked(error: &Error) -> Result<()> {
    if error.code == 0 {
        return Ok(());
    }
    ensure!(!error.message.is_null(), "libheif gives no reason");
    // SAFETY: the message is a text of the library that ends in a zero byte, "always defined" by heif.h.
    let message = unsafe { CStr::from_ptr(error.message) };
    Err(anyhow!("{}", message.to_string_lossy()))
}

/// A file that is open, and the picture in it that is shown first.
pub struct Primary<'a> {
    functions: &'static Functions,
    context: *mut Context,
    handle: *mut Handle,
    /// That the context reads.
    _bytes: &'a [u8],
}

/// Pixels, interleaved, of 3 channels or 4.
pub struct Decoded {
    pub width: usize,
    pub height: usize,
    pub channels: usize,
    /// Bits of a sample that count, 8 to 16.
    pub bits: u32,
    /// Of 8 bits, or of more in 2 bytes, the low one first; lines without padding.
    pub bytes: Vec<u8>,
}

impl<'a> Primary<'a> {
    /// # Errors
    /// The library is not there, or does not read the file.
    pub fn of(bytes: &'a [u8]) -> Result<Self> {
        let functions = functions().ok_or_else(|| anyhow!("libheif is not installed"))?;
        // SAFETY: heif.h's functions with what they gave. The context is freed by `Drop`, also where what follows fails, and reads
        // `bytes`, which outlive it.
        unsafe {
            let context = (functions.context_alloc)();
            ensure!(!context.is_null(), "libheif makes no context");
            let mut opened = Self {
                functions,
                context,
                handle: null_mut(),
                _bytes: bytes,
            };
            let (data, length) = (bytes.as_ptr().cast(), bytes.len());
            checked(&(functions.context_read_from_memory_without_copy)(
                context,
                data,
                length,
                null(),
            ))?;
            checked(&(functions.context_get_primary_image_handle)(
                context,
                &raw mut opened.handle,
            ))?;
            Ok(opened)
        }
    }

    /// Pictures in the file that stand for themselves.
    pub fn pictures(&self) -> usize {
        // SAFETY: the context is there.
        let count =
            unsafe { (self.functions.context_get_number_of_top_level_images)(self.context) };
        usize::try_from(count).unwrap_or(1)
    }

    /// Width and height, upright.
    pub fn size(&self) -> (u32, u32) {
        let f = self.functions;
        // SAFETY: the handle is there.
        let (width, height) = unsafe {
            (
                (f.image_handle_get_width)(self.handle),
                (f.image_handle_get_height)(self.handle),
            )
        };
        let side = |side: c_int| u32::try_from(side).unwrap_or(0);
        (side(width), side(height))
    }

    pub fn has_alpha(&self) -> bool {
        // SAFETY: the handle is there.
        unsafe { (self.functions.image_handle_has_alpha_channel)(self.handle) != 0 }
    }

    /// Whether colours are multiplied by alpha.
    pub fn is_premultiplied(&self) -> bool {
        // SAFETY: the handle is there.
        unsafe { (self.functions.image_handle_is_premultiplied_alpha)(self.handle) != 0 }
    }

    /// # Errors
    /// The library does not decode it, or gives what was not asked for.
    pub fn decode(&self) -> Result<Decoded> {
        let f = self.functions;
        let alpha = self.has_alpha();
        // SAFETY: the handle is there.
        let deep = unsafe { (f.image_handle_get_luma_bits_per_pixel)(self.handle) } > 8;
        let chroma = match (alpha, deep) {
            (false, false) => CHROMA_RGB,
            (true, false) => CHROMA_RGBA,
            (false, true) => CHROMA_RRGGBB_LE,
            (true, true) => CHROMA_RRGGBBAA_LE,
        };
        let mut image = null_mut();
        // SAFETY: the handle is there, and no options are the library's own.
        checked(&unsafe { (f.decode_image)(self.handle, &raw mut image, RGB, chroma, null()) })?;
        let pixels = Pixels {
            functions: f,
            image,
        };
        pixels.copied(if alpha { 4 } else { 3 }, if deep { 2 } else { 1 })
    }

    /// The ICC profile, where it has one.
    pub fn icc(&self) -> Option<Vec<u8>> {
        let f = self.functions;
        // SAFETY: the handle is there, and the room is as large as the library says.
        unsafe {
            let kind = (f.image_handle_get_color_profile_type)(self.handle);
            if kind != PROFILE_RICC && kind != PROFILE_PROF {
                return None;
            }
            let mut profile = vec![0; (f.image_handle_get_raw_color_profile_size)(self.handle)];
            let error =
                (f.image_handle_get_raw_color_profile)(self.handle, profile.as_mut_ptr().cast());
            (checked(&error).is_ok() && !profile.is_empty()).then_some(profile)
        }
    }

    /// Primaries and transfer by their numbers in ITU-T H.273, where it states them.
    pub fn stated_color(&self) -> Option<(u8, u8)> {
        let f = self.functions;
        let mut profile: *mut Nclx = null_mut();
        // SAFETY: the handle is there; what is given is read as its first version and freed.
        unsafe {
            let error = (f.image_handle_get_nclx_color_profile)(self.handle, &raw mut profile);
            if checked(&error).is_err() || profile.is_null() {
                return None;
            }
            let numbers = ((*profile).primaries, (*profile).transfer);
            (f.nclx_color_profile_free)(profile);
            Some((u8::try_from(numbers.0).ok()?, u8::try_from(numbers.1).ok()?))
        }
    }

    /// The first block of metadata whose type or content type is `kind`.
    pub fn metadata(&self, kind: &str) -> Option<Vec<u8>> {
        let f = self.functions;
        // SAFETY: the handle is there; identifiers are the library's own, texts end in zero bytes, and rooms are as large as it says.
        unsafe {
            let count = (f.image_handle_get_number_of_metadata_blocks)(self.handle, null());
            let mut blocks = vec![0; usize::try_from(count).ok()?];
            let found = (f.image_handle_get_list_of_metadata_block_IDs)(
                self.handle,
                null(),
                blocks.as_mut_ptr(),
                count,
            );
            blocks.truncate(usize::try_from(found).ok()?);
            let is = |text: *const c_char| {
                !text.is_null() && CStr::from_ptr(text).to_bytes() == kind.as_bytes()
            };
            let block = blocks.into_iter().find(|&block| {
                is((f.image_handle_get_metadata_type)(self.handle, block))
                    || is((f.image_handle_get_metadata_content_type)(
                        self.handle,
                        block,
                    ))
            })?;
            let mut data = vec![0; (f.image_handle_get_metadata_size)(self.handle, block)];
            let error = (f.image_handle_get_metadata)(self.handle, block, data.as_mut_ptr().cast());
            checked(&error).is_ok().then_some(data)
        }
    }
}

impl Drop for Primary<'_> {
    fn drop(&mut self) {
        // SAFETY: both were given by the library, once, and nothing uses them any more.
        unsafe {
            if !self.handle.is_null() {
                (self.functions.image_handle_release)(self.handle);
            }
            (self.functions.context_free)(self.context);
        }
    }
}

/// A decoded picture of the library's.
struct Pixels {
    functions: &'static Functions,
    image: *mut Image,
}

impl Pixels {
    fn copied(&self, channels: usize, sample: usize) -> Result<Decoded> {
        let f = self.functions;
        // SAFETY: the image is there.
        let (width, height, bits) = unsafe {
            (
                (f.image_get_width)(self.image, INTERLEAVED),
                (f.image_get_height)(self.image, INTERLEAVED),
                (f.image_get_bits_per_pixel_range)(self.image, INTERLEAVED),
            )
        };
        let (Ok(width), Ok(height), Ok(bits)) = (
            usize::try_from(width),
            usize::try_from(height),
            u32::try_from(bits),
        ) else {
            bail!("libheif decodes it to nothing");
        };
        let mut stride = 0;
        // SAFETY: the image is there.
        let plane =
            unsafe { (f.image_get_plane_readonly)(self.image, INTERLEAVED, &raw mut stride) };
        let stride = usize::try_from(stride)?;
        let row = width * channels * sample;
        ensure!(
            !plane.is_null() && row > 0 && height > 0 && stride >= row && (8..=16).contains(&bits),
            "libheif decodes it to nothing"
        );
        let mut bytes = Vec::with_capacity(row * height);
        for line in 0..height {
            // SAFETY: the plane has `height` lines, each `stride` bytes behind the one before and `row` long at least.
            bytes
                .extend_from_slice(unsafe { slice::from_raw_parts(plane.add(line * stride), row) });
        }
        Ok(Decoded {
            width,
            height,
            channels,
            bits,
            bytes,
        })
    }
}

impl Drop for Pixels {
    fn drop(&mut self) {
        // SAFETY: it was given by the library, once, and nothing uses it any more.
        unsafe { (self.functions.image_release)(self.image) }
    }
}
