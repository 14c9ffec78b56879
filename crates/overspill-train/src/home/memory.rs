//! The reference: all training state in ordinary memory, one array per unit, pieces as long as they can be, no store.

use std::collections::HashMap;
use std::mem;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::buffer::Buffer;
use super::io::IoReport;
use super::tile::widen;
use super::{GradientStart, Home, Left, Masters, PieceState, SavedInput, Source, Update, Visit};
use crate::error::{TrainError, check_stop};
use crate::identity::Reached;
use crate::layout::{ModelLayout, Unit, UnitLayout};

/// Keeps everything in memory.
#[derive(Debug)]
pub struct MemoryHome {
    layout: ModelLayout,
    units: Vec<UnitState>,
    inputs: HashMap<(usize, usize), Bytes>,
}

/// The arrays of one unit, `UnitLayout::padded` elements each, and the records of its pieces.
#[derive(Debug)]
struct UnitState {
    /// As they are stored.
    weights: Arc<Floats>,
    gradient: Vec<f32>,
    records: Vec<Floats>,
}

/// Weights that tensors may share, or other bytes that are aligned as numbers are.
#[derive(Debug)]
struct Floats(Vec<f32>);

impl Floats {
    fn zeros(bytes: usize) -> Self {
        Self(vec![0.0; bytes.div_ceil(size_of::<f32>())])
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}

/// A tensor's share of the weights.
struct Shared(Arc<Floats>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0.0)
    }
}

impl UnitState {
    /// Hands every piece to `each`, with its elements inside the unit.
    fn pieces(
        &mut self,
        layout: &ModelLayout,
        unit: &UnitLayout,
        mut each: impl FnMut(PieceState<'_>, Range<usize>),
    ) {
        let weights = Arc::get_mut(&mut self.weights).expect("no tensor outlives its pass over the layer");
        let (weights, weight_bytes) = (weights.bytes_mut(), layout.weight_bytes());
        for (piece, record) in unit.pieces(UNCUT).zip(&mut self.records) {
            let weights = &mut weights[piece.range.start * weight_bytes..piece.range.end * weight_bytes];
            let state = PieceState { unit, piece: &piece, weights, record: record.bytes_mut() };
            each(state, piece.range.clone());
        }
    }
}

/// Nothing is cut that need not be.
const UNCUT: usize = usize::MAX;

impl MemoryHome {
    /// Makes room for a model and fills its weights.
    ///
    /// # Errors
    /// What `source` fails with.
    pub fn new(layout: &ModelLayout, source: &mut Source<'_>) -> Result<Self, TrainError> {
        let mut units = Vec::with_capacity(layout.units().len());
        for unit in layout.units() {
            let mut values = vec![0.0; unit.padded];
            source(unit, &mut values)?;
            let mut state = UnitState {
                weights: Arc::new(Floats::zeros(layout.weights_bytes(unit))),
                gradient: Vec::new(),
                records: unit.pieces(UNCUT).map(|piece| Floats::zeros(piece.record_bytes())).collect(),
            };
            state.pieces(layout, unit, |mut piece, range| piece.initialize(&values[range]));
            values.fill(0.0);
            state.gradient = values;
            units.push(state);
        }
        Ok(Self { layout: layout.clone(), units, inputs: HashMap::new() })
    }
}

impl Home for MemoryHome {
    fn announce(&mut self, _visits: Vec<Visit>) -> Result<(), TrainError> {
        Ok(())
    }

    fn weights(&mut self, unit: Unit) -> Result<Bytes, TrainError> {
        let stored = Shared(self.units[self.layout.index(unit)].weights.clone());
        if self.layout.lends_weights() {
            return Ok(Bytes::from_owner(stored));
        }
        let mut widened = vec![0.0; self.layout.unit(unit).padded];
        widen(self.layout.weight_format(), stored.as_ref(), &mut widened);
        Ok(Bytes::from_owner(Shared(Arc::new(Floats(widened)))))
    }

    fn gradient(&mut self, unit: Unit, start: GradientStart) -> Result<Buffer, TrainError> {
        let mut gradient = mem::take(&mut self.units[self.layout.index(unit)].gradient);
        if start == GradientStart::Zero {
            gradient.fill(0.0);
        }
        Ok(Buffer::Owned(gradient))
    }

    fn put_gradient(&mut self, unit: Unit, gradient: Buffer) -> Result<(), TrainError> {
        let Buffer::Owned(gradient) = gradient else { unreachable!("this home hands out no other buffers") };
        self.units[self.layout.index(unit)].gradient = gradient;
        Ok(())
    }

    fn save_input(&mut self, which: SavedInput, input: &[f32]) -> Result<(), TrainError> {
        let copy = Arc::new(Floats(input.to_vec()));
        self.inputs.insert((which.layer, which.micro), Bytes::from_owner(Shared(copy)));
        Ok(())
    }

    fn saved_input(&mut self, which: SavedInput) -> Result<Bytes, TrainError> {
        let input = self.inputs.remove(&(which.layer, which.micro));
        Ok(input.expect("an input is saved before it is asked for"))
    }

    fn update(&mut self, update: &Update<'_>) -> Result<(), TrainError> {
        for (unit, state) in self.layout.units().iter().zip(&mut self.units) {
            check_stop(update.stop)?;
            let gradient = mem::take(&mut state.gradient);
            state.pieces(&self.layout, unit, |mut piece, range| piece.update(&gradient[range], update));
            state.gradient = gradient;
        }
        Ok(())
    }

    fn masters(&mut self, unit: Unit, each: &mut Masters<'_>) -> Result<(), TrainError> {
        let state = &mut self.units[self.layout.index(unit)];
        let unit = self.layout.unit(unit);
        let mut values = vec![0.0; unit.padded];
        state.pieces(&self.layout, unit, |mut piece, range| piece.masters(&mut values[range]));
        each(0, &values)
    }

    fn settle(&mut self) -> Result<(), TrainError> {
        Ok(())
    }

    fn commit(&mut self, _reached: &Reached) -> Result<(), TrainError> {
        Ok(())
    }

    fn left(&self) -> Option<Left> {
        None
    }

    fn io(&self) -> Option<IoReport> {
        None
    }
}
