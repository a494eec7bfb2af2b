//! Where the lines of a picture go: to a caller's sink, whose errors are its own, or together into one picture.

use anyhow::Result;

use super::types::PictureSink;
use crate::pixels::Pixels;

/// A caller's sink within the pipeline. What it refuses with is kept apart, so that no error of a disk is taken for one of the
/// networks, which would be done again.
pub struct Guarded<'a> {
    sink: &'a mut dyn PictureSink,
    refusal: Option<anyhow::Error>,
}

/// Stands for the error that a sink gave.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the picture was refused by what it was given to")]
struct Refused;

impl<'a> Guarded<'a> {
    pub fn new(sink: &'a mut dyn PictureSink) -> Self {
        Self {
            sink,
            refusal: None,
        }
    }

    /// The sink's own error, where it gave one, in place of what it led to.
    pub fn or_refusal<T>(self, result: Result<T>) -> Result<T> {
        match self.refusal {
            Some(error) => Err(error),
            None => result,
        }
    }

    fn kept(&mut self, taken: Result<()>) -> Result<()> {
        taken.map_err(|error| {
            self.refusal.get_or_insert(error);
            Refused.into()
        })
    }
}

impl PictureSink for Guarded<'_> {
    fn begin(&mut self, width: usize, height: usize) -> Result<()> {
        let taken = self.sink.begin(width, height);
        self.kept(taken)
    }

    fn lines(&mut self, values: Vec<f32>) -> Result<()> {
        let taken = self.sink.lines(values);
        self.kept(taken)
    }
}

/// Keeps all lines of a picture.
#[derive(Default)]
pub struct Whole {
    width: usize,
    height: usize,
    values: Vec<f32>,
}

impl Whole {
    /// # Errors
    /// Lines are missing.
    pub fn into_pixels(self) -> Result<Pixels> {
        Pixels::new(self.width, self.height, self.values)
    }
}

impl PictureSink for Whole {
    fn begin(&mut self, width: usize, height: usize) -> Result<()> {
        (self.width, self.height) = (width, height);
        self.values.clear();
        self.values.reserve_exact(3 * width * height);
        Ok(())
    }

    fn lines(&mut self, values: Vec<f32>) -> Result<()> {
        self.values.extend(values);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;
    use crate::device::{OutOfMemory, is_out_of_memory};

    /// Takes a number of pieces, then has no more memory, it says.
    struct Full(usize);

    impl PictureSink for Full {
        fn begin(&mut self, _: usize, _: usize) -> Result<()> {
            Ok(())
        }

        fn lines(&mut self, _: Vec<f32>) -> Result<()> {
            if self.0 == 0 {
                bail!(OutOfMemory);
            }
            self.0 -= 1;
            Ok(())
        }
    }

    #[test]
    fn what_a_sink_refuses_with_comes_back_as_it_is_and_is_never_an_error_of_the_networks() {
        let mut full = Full(1);
        let mut guarded = Guarded::new(&mut full);
        guarded.begin(1, 2).unwrap();
        guarded.lines(vec![0.0; 3]).unwrap();
        let within = guarded.lines(vec![0.0; 3]).unwrap_err();
        assert!(within.is::<Refused>() && !is_out_of_memory(&within));
        let outside = guarded.or_refusal(Err::<(), _>(within)).unwrap_err();
        assert_eq!(outside.to_string(), "out of memory");
    }

    #[test]
    fn a_picture_that_begins_again_forgets_what_it_had() {
        let mut whole = Whole::default();
        whole.begin(1, 2).unwrap();
        whole.lines(vec![0.5; 3]).unwrap();
        whole.begin(1, 2).unwrap();
        whole.lines(vec![0.25; 3]).unwrap();
        whole.lines(vec![0.75; 3]).unwrap();
        let pixels = whole.into_pixels().unwrap();
        assert_eq!(pixels.values, [0.25, 0.25, 0.25, 0.75, 0.75, 0.75]);
    }
}
