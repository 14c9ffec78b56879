//! The decoder once more, in double precision and without any cleverness: loops over indices, as the formulas read.

use overspill_train::config::{ModelConfig, Rope};
use overspill_train::layout::{ModelLayout, Unit};

/// A `[rows][columns]` matrix.
type Rows = Vec<Vec<f64>>;

/// The parameters of a model, each unit in its layout.
pub(crate) struct Reference<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) layout: &'a ModelLayout,
    pub(crate) units: Vec<Vec<f64>>,
}

impl Reference<'_> {
    /// The sum of the tokens' losses.
    pub(crate) fn loss(&self, ids: &[u32], targets: &[u32], seq: usize) -> f64 {
        let logits = self.logits(ids, seq);
        logits.iter().zip(targets).map(|(row, target)| log_sum_exp(row) - row[*target as usize]).sum()
    }

    /// The logits of every token.
    pub(crate) fn logits(&self, ids: &[u32], seq: usize) -> Rows {
        ids.chunks(seq).flat_map(|ids| self.sequence(ids)).collect()
    }

    fn sequence(&self, ids: &[u32]) -> Rows {
        let table = self.matrix(Unit::Embedding, 0);
        let mut x: Rows = ids.iter().map(|id| table[*id as usize].clone()).collect();
        for layer in 0..self.config.layers {
            let unit = Unit::Layer(layer);
            let normed = self.norm(&x, &self.matrix(unit, 0)[0]);
            let mut query = linear(&normed, &self.matrix(unit, 1));
            let mut key = linear(&normed, &self.matrix(unit, 2));
            let value = linear(&normed, &self.matrix(unit, 3));
            for position in 0..ids.len() {
                self.rotate(position, &mut query[position]);
                self.rotate(position, &mut key[position]);
            }
            add(&mut x, &linear(&self.attend(&query, &key, &value), &self.matrix(unit, 4)));
            let normed = self.norm(&x, &self.matrix(unit, 5)[0]);
            let mut gate = linear(&normed, &self.matrix(unit, 6));
            let up = linear(&normed, &self.matrix(unit, 7));
            for (gate, up) in gate.iter_mut().flatten().zip(up.iter().flatten()) {
                *gate *= up / (1.0 + (-*gate).exp());
            }
            add(&mut x, &linear(&gate, &self.matrix(unit, 8)));
        }
        let projection = if self.config.tied { table } else { self.matrix(Unit::Head, 1) };
        linear(&self.norm(&x, &self.matrix(Unit::Head, 0)[0]), &projection)
    }

    fn attend(&self, query: &Rows, key: &Rows, value: &Rows) -> Rows {
        let (heads, dim) = (self.config.heads, self.config.head_dim);
        let mut output = vec![vec![0.0; heads * dim]; query.len()];
        for head in 0..heads {
            let kv = head / (heads / self.config.kv_heads);
            for i in 0..query.len() {
                let scores: Vec<f64> = (0..=i)
                    .map(|j| (0..dim).map(|d| query[i][head * dim + d] * key[j][kv * dim + d]).sum::<f64>())
                    .map(|score| score / (dim as f64).sqrt())
                    .collect();
                let total = log_sum_exp(&scores);
                for (j, score) in scores.iter().enumerate() {
                    for d in 0..dim {
                        output[i][head * dim + d] += (score - total).exp() * value[j][kv * dim + d];
                    }
                }
            }
        }
        output
    }

    fn rotate(&self, position: usize, row: &mut [f64]) {
        let half = self.config.head_dim / 2;
        for head in row.chunks_mut(2 * half) {
            for i in 0..half {
                let angle = position as f64 * frequency(&self.config.rope, i, half);
                let (low, high) = (head[i], head[i + half]);
                head[i] = low * angle.cos() - high * angle.sin();
                head[i + half] = high * angle.cos() + low * angle.sin();
            }
        }
    }

    fn norm(&self, x: &Rows, gain: &[f64]) -> Rows {
        let normed = |row: &Vec<f64>| {
            let mean = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
            row.iter().zip(gain).map(|(v, g)| v * g / (mean + self.config.norm_eps).sqrt()).collect()
        };
        x.iter().map(normed).collect()
    }

    fn matrix(&self, unit: Unit, parameter: usize) -> Rows {
        let at = self.layout.index(unit);
        let parameter = &self.layout.units()[at].parameters[parameter];
        let columns = *parameter.shape.last().unwrap();
        self.units[at][parameter.range.clone()].chunks(columns).map(<[f64]>::to_vec).collect()
    }
}

fn frequency(rope: &Rope, i: usize, half: usize) -> f64 {
    let frequency = 1.0 / rope.theta.powf(i as f64 / half as f64);
    let Some(scaling) = &rope.scaling else { return frequency };
    let wavelength = std::f64::consts::TAU / frequency;
    let original = scaling.original_max_position_embeddings as f64;
    if wavelength < original / scaling.high_freq_factor {
        frequency
    } else if wavelength > original / scaling.low_freq_factor {
        frequency / scaling.factor
    } else {
        let smooth = (original / wavelength - scaling.low_freq_factor)
            / (scaling.high_freq_factor - scaling.low_freq_factor);
        (1.0 - smooth) * frequency / scaling.factor + smooth * frequency
    }
}

fn linear(x: &Rows, weight: &Rows) -> Rows {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    x.iter().map(|x| weight.iter().map(|w| dot(x, w)).collect()).collect()
}

fn add(x: &mut Rows, y: &Rows) {
    for (x, y) in x.iter_mut().flatten().zip(y.iter().flatten()) {
        *x += y;
    }
}

fn log_sum_exp(x: &[f64]) -> f64 {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + x.iter().map(|v| (v - max).exp()).sum::<f64>().ln()
}
