//! Many tensors in one pinned block, each with a file of its own.

use std::path::Path;

use overspill_io::{Block, Direction, Engine};

use super::alignment::Alignment;
use super::dtype::{Dtype, TensorBytes};
use super::dump::{Describe, Field};
use super::error::SwapError;
use super::flight::{BufferFailed, BufferInFlight, Remains, launch};
use super::layout::{Entry, Layout};
use super::transfer::Targets;
use super::view::{View, ViewMut};

/// Tensors of one dtype, packed into one block.
#[derive(Debug)]
pub struct SwapBuffer {
    block: Block,
    layout: Layout,
}

impl SwapBuffer {
    /// An empty buffer over `block`. Room is the block's length, rounded down to a multiple of
    /// [`BLOCK_ALIGNMENT`](overspill_io::BLOCK_ALIGNMENT).
    #[must_use]
    pub fn new(block: Block, dtype: Dtype, alignment: Alignment) -> SwapBuffer {
        let layout = Layout::new(block.len(), dtype, alignment);
        SwapBuffer { block, layout }
    }

    /// What its tensors' elements are.
    #[must_use]
    pub fn dtype(&self) -> Dtype {
        self.layout.dtype()
    }

    /// Elements of the longest tensor that fits in it when it is empty.
    #[must_use]
    pub fn numel_max(&self) -> usize {
        self.layout.numel_max()
    }

    /// Whether there is room for one more tensor, of `numel` elements.
    #[must_use]
    pub fn has_space(&self, numel: usize) -> bool {
        self.layout.has_space(numel)
    }

    /// Whether a tensor for `path` is in it.
    #[must_use]
    pub fn holds(&self, path: &Path) -> bool {
        self.layout.holds(path)
    }

    /// Whether there is no tensor in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.layout.entries().is_empty()
    }

    /// Number of tensors in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.layout.entries().len()
    }

    /// Sum of the tensors' elements, without what is swapped along.
    #[must_use]
    pub fn numel(&self) -> usize {
        self.layout.numel()
    }

    /// Bytes that the tensors' regions take; so much is written or read.
    #[must_use]
    pub fn bytes_used(&self) -> usize {
        self.layout.used()
    }

    /// Makes room for a tensor of `numel` elements, whose file is `path`, behind all others. Its elements are
    /// whatever was there; what is behind them is zeroed.
    ///
    /// # Errors
    ///
    /// [`SwapError::TooLarge`] if it would not fit in an empty buffer, [`SwapError::NoRoom`] if it does not now,
    /// [`SwapError::Held`] if a tensor for `path` is here. Nothing has changed then.
    pub fn allocate(&mut self, numel: usize, path: &Path) -> Result<ViewMut<'_>, SwapError> {
        let entry = self.layout.place(numel, path)?;
        zero_padding(&mut self.block, &entry);
        let dtype = self.layout.dtype();
        let placed = self.layout.entries().last().expect("a tensor was placed");
        Ok(ViewMut::new(placed, dtype, &mut self.block[placed.offset..]))
    }

    /// Copies `tensor`, whose file is `path`, behind all others.
    ///
    /// # Errors
    ///
    /// As [`SwapBuffer::allocate`], and [`SwapError::WrongDtype`] if its elements are not the buffer's. Nothing has
    /// changed then.
    pub fn insert(&mut self, tensor: TensorBytes<'_>, path: &Path) -> Result<ViewMut<'_>, SwapError> {
        check_dtype(self.dtype(), tensor, path)?;
        let mut view = self.allocate(tensor.numel(), path)?;
        view.compute().copy_from_slice(tensor.bytes());
        Ok(view)
    }

    /// All tensors, in the order in which they came; each has its swap view and its compute view.
    pub fn views(&self) -> impl ExactSizeIterator<Item = View<'_>> + DoubleEndedIterator {
        let view = |entry| View::new(entry, self.dtype(), region(&self.block, entry));
        self.layout.entries().iter().map(view)
    }

    /// All tensors, to change them.
    pub fn views_mut(&mut self) -> impl Iterator<Item = ViewMut<'_>> {
        let SwapBuffer { block, layout } = self;
        let mut rest: &mut [u8] = block;
        let dtype = layout.dtype();
        let cut = move |entry| -> ViewMut<'_> {
            let &Entry { lengths, .. } = entry;
            let (region, behind) = std::mem::take(&mut rest).split_at_mut(lengths.region);
            rest = behind;
            ViewMut::new(entry, dtype, region)
        };
        layout.entries().iter().map(cut)
    }

    /// The tensor that begins at byte `offset` of the buffer, if one does; of an empty one and its successor, the
    /// successor.
    #[must_use]
    pub fn view_at(&self, offset: usize) -> Option<View<'_>> {
        let entry = self.layout.at(offset)?;
        Some(View::new(entry, self.dtype(), region(&self.block, entry)))
    }

    /// The tensor that begins at byte `offset` of the buffer, to change it.
    pub fn view_at_mut(&mut self, offset: usize) -> Option<ViewMut<'_>> {
        let entry = self.layout.at(offset)?;
        Some(ViewMut::new(entry, self.layout.dtype(), &mut self.block[entry.offset..]))
    }

    /// The tensors' files, in the order in which the tensors came.
    pub fn paths(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.layout.entries().iter().map(|entry| &*entry.path)
    }

    /// Forgets every tensor.
    pub fn reset(&mut self) {
        self.layout.clear();
    }

    /// The memory, without the tensors.
    #[must_use]
    pub fn into_block(self) -> Block {
        self.block
    }

    /// Starts writing every tensor to its file, as [`swap_out_tensors`](super::swap_out_tensors) does.
    ///
    /// # Errors
    ///
    /// [`BufferFailed`] with the buffer, and nothing was started: [`SwapError::Io`], [`SwapError::SameFile`].
    pub fn swap_out(self, engine: &Engine) -> Result<BufferInFlight, BufferFailed> {
        self.swap(engine, Direction::Write)
    }

    /// Starts reading every tensor from its file, which [`SwapBuffer::swap_out`] has written: a file that ends inside
    /// its region is too short, be it only by zeros.
    ///
    /// # Errors
    ///
    /// [`BufferFailed`] with the buffer, and nothing was started: [`SwapError::Io`], [`SwapError::ShortFile`],
    /// [`SwapError::SameFile`].
    pub fn swap_in(self, engine: &Engine) -> Result<BufferInFlight, BufferFailed> {
        self.swap(engine, Direction::Read)
    }

    fn swap(self, engine: &Engine, direction: Direction) -> Result<BufferInFlight, BufferFailed> {
        match Targets::open(engine, direction, self.requests()) {
            Ok(targets) => self.launch(engine, targets),
            Err(error) => Err(BufferFailed { error, remains: Remains::Whole(self) }),
        }
    }

    /// Hands all transfers to the engine; `targets` are the files of [`SwapBuffer::requests`].
    pub(crate) fn launch(self, engine: &Engine, targets: Targets) -> Result<BufferInFlight, BufferFailed> {
        let launched = launch(engine, targets, vec![self]);
        let only = "one buffer was launched";
        launched.map(|mut flights| flights.pop().expect(only)).map_err(|(error, mut buffers)| {
            let remains = Remains::Whole(buffers.pop().expect(only));
            BufferFailed { error, remains }
        })
    }

    /// The tensors' files, and how many bytes of each are moved.
    pub(crate) fn requests(&self) -> impl Iterator<Item = (&Path, usize)> {
        self.layout.entries().iter().map(|entry| (&*entry.path, entry.lengths.region))
    }

    /// The memory, and what is where in it.
    pub(super) fn into_parts(self) -> (Block, Layout) {
        (self.block, self.layout)
    }

    /// The buffer again. What is behind the tensors is zeroed: a file may have brought something along.
    pub(super) fn from_parts(mut block: Block, layout: Layout) -> SwapBuffer {
        for entry in layout.entries() {
            zero_padding(&mut block, entry);
        }
        SwapBuffer { block, layout }
    }

    /// The room that is left, in bytes.
    pub(super) fn bytes_free(&self) -> usize {
        self.layout.free()
    }
}

/// Refuses a tensor whose elements are not the buffers'.
pub(crate) fn check_dtype(expected: Dtype, tensor: TensorBytes<'_>, path: &Path) -> Result<(), SwapError> {
    let found = tensor.dtype();
    if found == expected {
        Ok(())
    } else {
        Err(SwapError::WrongDtype { path: path.to_owned(), expected, found })
    }
}

fn region<'a>(block: &'a [u8], entry: &Entry) -> &'a [u8] {
    &block[entry.offset..entry.end()]
}

fn zero_padding(block: &mut [u8], entry: &Entry) {
    block[entry.offset + entry.lengths.compute..entry.end()].fill(0);
}

impl Describe for SwapBuffer {
    fn title(&self) -> &'static str {
        "SwapBuffer"
    }

    fn describe(&self, show: &mut dyn FnMut(Field<'_>)) {
        show(("dtype", &format_args!("{}", self.dtype())));
        show(("alignment", &self.layout.alignment().bytes()));
        show(("bytes", &self.block.len()));
        show(("bytes_used", &self.bytes_used()));
        show(("numel", &self.numel()));
        show(("paths", &self.paths().collect::<Vec<_>>()));
    }
}
