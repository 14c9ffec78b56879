//! Buffers on their way, and what comes home.
//!
//! To move, a block is cut between the regions, one block for each tensor's transfer, and what is left over waits
//! beside them. At the end the parts are joined in the same order, so the buffer is the same piece of memory again.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use overspill_io::{Block, Engine};

use super::buffer::SwapBuffer;
use super::dtype::Dtype;
use super::error::SwapError;
use super::layout::{Entry, Layout};
use super::transfer::{FileId, SwapTicket, Targets};

/// A buffer whose tensors are on their way to or from their files.
#[derive(Debug)]
#[must_use = "the buffer and the outcome come back by waiting"]
pub struct BufferInFlight {
    layout: Layout,
    /// The start of the block, which no region has; it is what the others are joined to.
    head: Block,
    /// One for each tensor.
    tickets: Vec<SwapTicket>,
    /// What is behind the last region.
    tail: Block,
    /// Those of its files that are on a disk.
    files: HashSet<FileId>,
}

/// A buffer that did not move, or not all of whose tensors did.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct BufferFailed {
    /// The first failure, in the order of the tensors; it names the file.
    pub error: SwapError,
    /// What came home.
    pub remains: Remains,
}

/// What there is of a buffer after a failure.
#[derive(Debug)]
pub enum Remains {
    /// All of it: after a write with the data, after a read with unspecified bytes in what failed.
    Whole(SwapBuffer),
    /// Pieces: the kernel never gave the memory of some tensors back.
    Parts(Vec<Part>),
}

/// One tensor of a buffer that is not whole any more.
#[derive(Debug)]
pub struct Part {
    /// Its file.
    pub path: PathBuf,
    /// Its length, in elements.
    pub numel: usize,
    /// Its elements.
    pub dtype: Dtype,
    /// Its region, which begins with them. `None` if the kernel never gave it back.
    pub block: Option<Block>,
}

impl Remains {
    /// The tensors' files.
    #[must_use]
    pub fn paths(&self) -> Vec<PathBuf> {
        match self {
            Remains::Whole(buffer) => buffer.paths().map(Path::to_owned).collect(),
            Remains::Parts(parts) => parts.iter().map(|part| part.path.clone()).collect(),
        }
    }
}

/// Hands the transfers of all buffers to the engine, or none; `targets` are the files of all their requests.
pub(super) fn launch(
    engine: &Engine,
    targets: Targets,
    buffers: Vec<SwapBuffer>,
) -> Result<Vec<BufferInFlight>, (SwapError, Vec<SwapBuffer>)> {
    if let Err(error) = targets.cut() {
        return Err((error, buffers));
    }
    let mut ids = targets.ids();
    let mut regions = Vec::new();
    let mut frames = Vec::new();
    for buffer in buffers {
        let (mut block, layout) = buffer.into_parts();
        let tail = block.split_off(layout.used());
        let mut cut: Vec<Block> =
            layout.entries().iter().rev().map(|entry| block.split_off(entry.offset)).collect();
        cut.reverse();
        let files = ids.by_ref().take(cut.len()).flatten().collect();
        regions.append(&mut cut);
        frames.push(BufferInFlight { layout, head: block, tickets: Vec::new(), tail, files });
    }
    drop(ids);
    let mut tickets = targets.submit(engine, regions).into_iter();
    for frame in &mut frames {
        frame.tickets = tickets.by_ref().take(frame.layout.entries().len()).collect();
    }
    Ok(frames)
}

impl BufferInFlight {
    /// Whether [`BufferInFlight::wait`] would return at once.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.tickets.iter().all(SwapTicket::is_done)
    }

    /// Elements of the longest tensor that fits in the buffer when it is empty.
    #[must_use]
    pub fn numel_max(&self) -> usize {
        self.layout.numel_max()
    }

    /// The tensors' files.
    pub fn paths(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.tickets.iter().map(SwapTicket::path)
    }

    /// Whether one of its files is one of `targets`.
    pub(crate) fn meets(&self, targets: &Targets) -> bool {
        targets.ids().flatten().any(|id| self.files.contains(&id))
    }

    /// Waits until every transfer is over, whether or not one has failed.
    ///
    /// # Errors
    ///
    /// [`BufferFailed`] with [`SwapError::Io`] and what came home.
    pub fn wait(self) -> Result<SwapBuffer, BufferFailed> {
        let BufferInFlight { layout, head, tickets, tail, .. } = self;
        let mut first_error = None;
        let land = |ticket: SwapTicket| {
            ticket.wait().map_or_else(
                |failed| {
                    first_error.get_or_insert(failed.error);
                    failed.block
                },
                Some,
            )
        };
        let parts: Vec<Option<Block>> = tickets.into_iter().map(land).collect();
        let remains = reunite(layout, head, parts, tail);
        match (first_error, remains) {
            (None, Remains::Whole(buffer)) => Ok(buffer),
            (None, Remains::Parts(_)) => unreachable!("a transfer that succeeds brings its block back"),
            (Some(error), remains) => Err(BufferFailed { error, remains }),
        }
    }
}

/// Joins what was cut for a flight, if all of it is there.
fn reunite(layout: Layout, head: Block, parts: Vec<Option<Block>>, tail: Block) -> Remains {
    if parts.iter().any(Option::is_none) {
        let dtype = layout.dtype();
        let part = |(entry, block): (&Entry, Option<Block>)| {
            let &Entry { ref path, numel, .. } = entry;
            Part { path: path.to_path_buf(), numel, dtype, block }
        };
        return Remains::Parts(layout.entries().iter().zip(parts).map(part).collect());
    }
    let whole =
        parts.into_iter().flatten().chain([tail]).fold(head, |whole, part| {
            whole.join(part).expect("the parts were cut off one block in this order")
        });
    Remains::Whole(SwapBuffer::from_parts(whole, layout))
}
