//! The block of two convolutions that all of these networks are made of.

use anyhow::Result;

use super::{Norm, Room, Source, conv, keep_between, store, store_both};
use crate::layers::{Conv2d, NormAct};

/// `conv2(norm2(conv1(norm1(x)))) + shortcut(x)`
pub struct Residual<'a> {
    pub norm1: NormAct,
    pub conv1: &'a Conv2d,
    pub norm2: NormAct,
    pub conv2: &'a Conv2d,
    /// None: `x` itself is added.
    pub shortcut: Option<&'a Conv2d>,
}

impl<'a> Residual<'a> {
    /// `x` is this block's own: its lines go as soon as nothing else reads them.
    ///
    /// # Errors
    /// As [`store`].
    pub fn forward(self, x: Source<'a>, room: &Room) -> Result<Source<'a>> {
        let norm1 = Norm::of(&*x, self.norm1, room)?;
        let groups = Some(self.norm2.groups);
        let (hidden, residual) = match self.shortcut {
            Some(shortcut) => {
                let residual = conv(x.again(), shortcut).boxed();
                let hidden = conv(x, self.conv1).normed(norm1).boxed();
                if room.recomputes(hidden.size()) {
                    (hidden, residual)
                } else {
                    // The one that owns the map last: where it is whole, it is normed in its own memory.
                    let (residual, hidden) = store_both((residual, None), (hidden, groups), room)?;
                    (hidden, residual)
                }
            }
            None => {
                let hidden = conv(x.again(), self.conv1).normed(norm1).boxed();
                (keep_between(hidden, groups, room)?, x)
            }
        };
        let norm2 = Norm::of(&*hidden, self.norm2, room)?;
        let sum = conv(hidden, self.conv2).normed(norm2).plus(residual);
        store(sum.boxed(), groups, room)
    }
}
