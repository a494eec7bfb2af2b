//! From computing to writing: an item, then what is made of it as it is made, then how that ended. One pair of threads has one
//! of these; what is on its way is bounded in bytes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, anyhow, bail};
use sd_upscale::PictureSink;

use crate::item::{Item, LatentForm, Size};

/// Bytes of values on their way: a few pieces of the largest pictures, and all of a small one, so that the next can be computed
/// while it is encoded.
const ON_THE_WAY: usize = 64 << 20;

/// What is sent.
pub enum Parcel {
    /// What follows is of this one, up to [`Parcel::Closed`].
    Item(Box<Handed>),
    /// A picture begins: the result, or after it the decoded input; or the one that was begun, anew.
    Begin(Size),
    /// Its next lines, (n, width, 3), 0..=1.
    Lines(Values),
    /// All of its lines were sent.
    End,
    /// The result where it is latents: (4, h, w), scaled, and h and w.
    Latents(Values, Size),
    /// Nothing more comes of the item; of one that failed, why.
    Closed(Result<()>),
}

/// An item as it is handed on.
pub struct Handed {
    pub item: Item,
    pub form: LatentForm,
    /// Set by who takes it: nothing more need be computed of it.
    pub refused: Arc<AtomicBool>,
}

/// Values, and the room that they take.
pub struct Values {
    values: Vec<f32>,
    /// Given back with them.
    _taken: Taken,
}

impl Values {
    /// The values; their room is free.
    pub fn take(self) -> Vec<f32> {
        self.values
    }
}

/// Room for what is on its way.
#[derive(Default)]
struct Room {
    taken: Mutex<usize>,
    freed: Condvar,
}

impl Room {
    fn lock(&self) -> MutexGuard<'_, usize> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A part of a [`Room`].
struct Taken {
    bytes: usize,
    room: Arc<Room>,
}

impl Taken {
    /// Waits until there is room: something larger than all of it goes alone.
    fn of(room: &Arc<Room>, bytes: usize) -> Self {
        let full = |taken: &mut usize| *taken > 0 && *taken + bytes > ON_THE_WAY;
        let mut taken = room
            .freed
            .wait_while(room.lock(), full)
            .unwrap_or_else(PoisonError::into_inner);
        *taken += bytes;
        Self {
            bytes,
            room: room.clone(),
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        *self.room.lock() -= self.bytes;
        self.room.freed.notify_one();
    }
}

/// The sending end, of one thread that computes.
pub struct Outbox {
    parcels: Sender<Parcel>,
    room: Arc<Room>,
    /// Of the item that is open.
    open: Option<Arc<AtomicBool>>,
}

/// Both ends.
pub fn outbox() -> (Outbox, Receiver<Parcel>) {
    let (parcels, inbox) = channel();
    let outbox = Outbox {
        parcels,
        room: Arc::default(),
        open: None,
    };
    (outbox, inbox)
}

impl Outbox {
    /// Hands an item on: whoever takes it tells what became of it.
    ///
    /// # Errors
    /// No one is there to take it, as with all that follow.
    pub fn item(&mut self, item: Item, form: LatentForm) -> Result<()> {
        let refused = Arc::new(AtomicBool::new(false));
        self.open = Some(refused.clone());
        self.send(Parcel::Item(Box::new(Handed {
            item,
            form,
            refused,
        })))
    }

    /// All lines of a picture were given.
    pub fn end_picture(&self) -> Result<()> {
        self.send(Parcel::End)
    }

    /// The result where it is latents.
    pub fn latents(&self, values: Vec<f32>, size: Size) -> Result<()> {
        self.send(Parcel::Latents(self.values(values), size))
    }

    /// Whether an item was handed on and not closed.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Nothing more comes of the item.
    pub fn close(&mut self, done: Result<()>) -> Result<()> {
        self.open = None;
        self.send(Parcel::Closed(done))
    }

    fn values(&self, values: Vec<f32>) -> Values {
        let bytes = size_of_val(values.as_slice());
        Values {
            values,
            _taken: Taken::of(&self.room, bytes),
        }
    }

    fn send(&self, parcel: Parcel) -> Result<()> {
        let gone = |_| anyhow!("the run has ended");
        self.parcels.send(parcel).map_err(gone)
    }

    /// # Errors
    /// Whoever took the item wants no more of it, and has said why.
    fn still_wanted(&self) -> Result<()> {
        let refused = |open: &Arc<AtomicBool>| open.load(Ordering::Relaxed);
        if self.open.as_ref().is_some_and(refused) {
            bail!("the result cannot be written");
        }
        Ok(())
    }
}

impl PictureSink for Outbox {
    fn begin(&mut self, width: usize, height: usize) -> Result<()> {
        self.still_wanted()?;
        self.send(Parcel::Begin(Size { width, height }))
    }

    fn lines(&mut self, values: Vec<f32>) -> Result<()> {
        self.still_wanted()?;
        self.send(Parcel::Lines(self.values(values)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_is_on_its_way_is_bounded_and_nobody_waits_for_one_who_is_gone() {
        let (mut outbox, inbox) = outbox();
        // A third of the room each.
        let third = ON_THE_WAY / 3 / 4;
        let sent = std::thread::spawn(move || {
            let mut sent = 0;
            while outbox.lines(vec![0.0; third]).is_ok() {
                sent += 1;
            }
            sent
        });
        for _ in 0..6 {
            let Ok(Parcel::Lines(values)) = inbox.recv() else {
                panic!("no lines came");
            };
            assert_eq!(values.take().len(), third);
        }
        // However long it has: three more are on their way at most.
        std::thread::sleep(Duration::from_millis(50));
        drop(inbox);
        assert!((6..=9).contains(&sent.join().unwrap()));
    }

    #[test]
    fn a_piece_that_is_larger_than_the_room_goes_alone() {
        let (mut outbox, inbox) = outbox();
        outbox.lines(vec![0.0; ON_THE_WAY / 4 + 1]).unwrap();
        assert!(matches!(inbox.recv(), Ok(Parcel::Lines(_))));
        outbox.lines(vec![0.0; 1]).unwrap();
    }
}
