//! The file formats by name, and what each can hold.

use super::heif;

/// A raster file format that is read; all but HEIF and GIF are written too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// PNG, also animated.
    Png,
    /// JPEG, baseline or progressive.
    Jpeg,
    /// WebP, lossy, lossless or animated.
    WebP,
    /// TIFF and BigTIFF.
    Tiff,
    /// Windows and OS/2 bitmaps.
    Bmp,
    /// JPEG XL, written without loss.
    Jxl,
    /// HEIC and AVIF, which are only read, and that by libheif where the machine has it.
    Heif,
    /// GIF, which is only read.
    Gif,
}

impl Format {
    /// The formats that can be written.
    pub const WRITABLE: [Format; 6] = [
        Format::Png,
        Format::Jpeg,
        Format::WebP,
        Format::Tiff,
        Format::Bmp,
        Format::Jxl,
    ];

    /// The format meant by a file extension or a `--format` value, in any case and without the dot.
    pub fn from_extension(extension: &str) -> Option<Self> {
        Some(match extension.to_ascii_lowercase().as_str() {
            "png" | "apng" => Format::Png,
            "jpg" | "jpeg" | "jpe" | "jfif" => Format::Jpeg,
            "webp" => Format::WebP,
            "tif" | "tiff" => Format::Tiff,
            "bmp" | "dib" => Format::Bmp,
            "jxl" => Format::Jxl,
            "heic" | "heif" | "hif" | "avif" => Format::Heif,
            "gif" => Format::Gif,
            _ => return None,
        })
    }

    /// The usual extension, without the dot.
    pub fn extension(self) -> &'static str {
        match self {
            Format::Png => "png",
            Format::Jpeg => "jpg",
            Format::WebP => "webp",
            Format::Tiff => "tif",
            Format::Bmp => "bmp",
            Format::Jxl => "jxl",
            Format::Heif => "heic",
            Format::Gif => "gif",
        }
    }

    /// The name people know it by.
    pub fn name(self) -> &'static str {
        match self {
            Format::Png => "PNG",
            Format::Jpeg => "JPEG",
            Format::WebP => "WebP",
            Format::Tiff => "TIFF",
            Format::Bmp => "BMP",
            Format::Jxl => "JPEG XL",
            Format::Heif => "HEIF",
            Format::Gif => "GIF",
        }
    }

    /// Whether [`encode`](super::encode) knows it.
    pub fn is_writable(self) -> bool {
        !matches!(self, Format::Gif | Format::Heif)
    }

    /// Whether this machine has what reads it.
    pub fn is_read_here(self) -> bool {
        self != Format::Heif || heif::is_here()
    }

    /// The largest side that the format's header can state, in pixels.
    pub fn max_side(self) -> usize {
        match self {
            Format::WebP => 16383,
            Format::Jpeg | Format::Gif => 65535,
            // 2^30 in the standard.
            Format::Jxl => 1 << 30,
            Format::Png | Format::Tiff | Format::Bmp | Format::Heif => i32::MAX as usize,
        }
    }

    /// Whether transparency is written.
    pub fn keeps_alpha(self) -> bool {
        matches!(
            self,
            Format::Png | Format::WebP | Format::Tiff | Format::Jxl
        )
    }

    /// Whether grey is written as one channel: libwebp takes none, and few readers know TIFF's grey with alpha.
    pub fn keeps_gray(self, with_alpha: bool) -> bool {
        match self {
            Format::WebP => false,
            Format::Tiff => !with_alpha,
            _ => true,
        }
    }

    /// Whether channels of 16 bits are written.
    pub fn keeps_sixteen_bits(self, with_alpha: bool) -> bool {
        matches!(self, Format::Png | Format::Tiff) || (self == Format::Jxl && !with_alpha)
    }
}
