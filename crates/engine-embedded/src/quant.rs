//! Weights as the kernels read them, and how the file's encodings become that.
//!
//! A matrix of `outputs x inputs` is cut into groups of [`LANES`] outputs and blocks of [`BLOCK`] inputs. One group's
//! block is a *panel*: lane `l` of a vector register belongs to output `16 * group + l`, so a product needs no
//! horizontal sum. Bytes lie in quads of four consecutive inputs, as the integer dot product instructions take them.
//! The last group is padded with zero weights.

use crate::kernels::LANES;

/// Inputs that share a scale, in weights and activations: GGUF's block for the encodings read here.
pub(crate) const BLOCK: usize = 32;
const QUADS: usize = BLOCK / 4;

/// 32 inputs of 16 outputs, four bits each: weight = `scale * nibble + min`. Line `i` holds quad `i` in its low and
/// quad `i + 4` in its high nibbles: the order of a Q4_1 block, whose bytes are therefore copied as they are.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub(crate) struct Q4Panel {
    pub(crate) quants: [[u8; 4 * LANES]; QUADS / 2],
    /// Half precision, as in the file.
    pub(crate) scale: [u16; LANES],
    pub(crate) min: [u16; LANES],
}

/// 32 inputs of 16 outputs, eight bits each: weight = `scale * (byte - 128)`. Offset by 128 because the dot product
/// instructions want one unsigned side.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub(crate) struct Q8Panel {
    pub(crate) quants: [[u8; 4 * LANES]; QUADS],
    pub(crate) scale: [f32; LANES],
}

/// Panels of one format, group by group, the blocks of a group in order.
#[derive(Debug, Clone)]
pub(crate) enum Panels {
    Q4(Vec<Q4Panel>),
    Q8(Vec<Q8Panel>),
}

/// A weight matrix in panels.
#[derive(Debug, Clone)]
pub(crate) struct Matrix {
    pub(crate) panels: Panels,
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
}

/// How a tensor's numbers are written in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    F32,
    F16,
    Q4_0,
    Q4_1,
    Q8_0,
}

impl Encoding {
    /// Of GGUF's tensor type number; `None` for those that this engine does not read.
    pub(crate) fn of_gguf(kind: u32) -> Option<Self> {
        match kind {
            0 => Some(Self::F32),
            1 => Some(Self::F16),
            2 => Some(Self::Q4_0),
            3 => Some(Self::Q4_1),
            8 => Some(Self::Q8_0),
            _ => None,
        }
    }

    /// Bytes of [`BLOCK`] numbers.
    pub(crate) fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4 * BLOCK,
            Self::F16 => 2 * BLOCK,
            Self::Q4_0 => 2 + BLOCK / 2,
            Self::Q4_1 => 4 + BLOCK / 2,
            Self::Q8_0 => 2 + BLOCK,
        }
    }
}

/// A scale that is infinite or not a number: no encoder writes one.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NotFinite;

impl Matrix {
    /// Packs rows of encoded blocks, one row an output. `bytes` holds exactly `outputs * inputs` numbers, and `inputs`
    /// is a multiple of [`BLOCK`]. Q4_1 stays as it is and Q8_0 keeps its values; Q4_0 is widened to eight bits
    /// without loss; F16 and F32 are rounded to eight bits a block, so that there is one way to compute.
    pub(crate) fn pack(
        encoding: Encoding,
        bytes: &[u8],
        outputs: usize,
        inputs: usize,
    ) -> Result<Self, NotFinite> {
        let blocks = inputs / BLOCK;
        assert_eq!(bytes.len(), outputs * blocks * encoding.block_bytes(), "the directory was checked");
        let source = |group: usize, lane: usize, block: usize| {
            let output = group * LANES + lane;
            let start = (output * blocks + block) * encoding.block_bytes();
            (output < outputs).then(|| &bytes[start..start + encoding.block_bytes()])
        };
        let groups = outputs.div_ceil(LANES);
        let places = (0..groups).flat_map(|group| (0..blocks).map(move |block| (group, block)));
        let panels = if encoding == Encoding::Q4_1 {
            let panel = |(group, block)| Q4Panel::pack(|lane| source(group, lane, block));
            Panels::Q4(places.map(panel).collect::<Result<_, _>>()?)
        } else {
            let panel = |(group, block)| Q8Panel::pack(|lane| source(group, lane, block), encoding);
            Panels::Q8(places.map(panel).collect::<Result<_, _>>()?)
        };
        Ok(Self { panels, outputs, inputs })
    }

    /// Packs plain numbers, row by row, rounded to eight bits a block.
    pub(crate) fn from_f32(rows: &[f32], outputs: usize, inputs: usize) -> Self {
        let bytes: Vec<u8> = rows.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self::pack(Encoding::F32, &bytes, outputs, inputs).expect("generated weights are finite")
    }

    /// Writes the weights of one output, decoded, to `row`: an embedding's look-up.
    pub(crate) fn decode_row(&self, output: usize, row: &mut [f32]) {
        let blocks = self.inputs / BLOCK;
        let (group, lane) = (output / LANES, output % LANES);
        for (block, values) in row.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
            let place = group * blocks + block;
            match &self.panels {
                Panels::Q4(panels) => panels[place].decode(lane, values),
                Panels::Q8(panels) => panels[place].decode(lane, values),
            }
        }
    }

    /// Memory of the panels.
    pub(crate) fn bytes(&self) -> u64 {
        let bytes = match &self.panels {
            Panels::Q4(panels) => size_of_val(panels.as_slice()),
            Panels::Q8(panels) => size_of_val(panels.as_slice()),
        };
        bytes as u64
    }
}

impl Q4Panel {
    fn pack<'a>(source: impl Fn(usize) -> Option<&'a [u8]>) -> Result<Self, NotFinite> {
        let mut panel = Self { quants: [[0; 4 * LANES]; QUADS / 2], scale: [0; LANES], min: [0; LANES] };
        for lane in 0..LANES {
            let Some(block) = source(lane) else { continue };
            panel.scale[lane] = u16::from_le_bytes([block[0], block[1]]);
            panel.min[lane] = u16::from_le_bytes([block[2], block[3]]);
            if !f16_to_f32(panel.scale[lane]).is_finite() || !f16_to_f32(panel.min[lane]).is_finite() {
                return Err(NotFinite);
            }
            for (line, quad) in panel.quants.iter_mut().zip(block[4..].as_chunks::<4>().0) {
                line[4 * lane..4 * lane + 4].copy_from_slice(quad);
            }
        }
        Ok(panel)
    }

    fn decode(&self, lane: usize, values: &mut [f32; BLOCK]) {
        let (scale, min) = (f16_to_f32(self.scale[lane]), f16_to_f32(self.min[lane]));
        for (i, value) in values.iter_mut().enumerate() {
            let (quad, byte) = (i / 4, i % 4);
            let pair = self.quants[quad % 4][4 * lane + byte];
            let nibble = if quad < 4 { pair & 15 } else { pair >> 4 };
            *value = scale * f32::from(nibble) + min;
        }
    }
}

impl Q8Panel {
    fn pack<'a>(source: impl Fn(usize) -> Option<&'a [u8]>, encoding: Encoding) -> Result<Self, NotFinite> {
        let mut panel = Self { quants: [[128; 4 * LANES]; QUADS], scale: [0.0; LANES] };
        for lane in 0..LANES {
            let Some(block) = source(lane) else { continue };
            let (scale, quants) = to_q8(encoding, block);
            if !scale.is_finite() {
                return Err(NotFinite);
            }
            panel.scale[lane] = scale;
            for (line, quad) in panel.quants.iter_mut().zip(quants.as_chunks::<4>().0) {
                for (byte, quant) in line[4 * lane..4 * lane + 4].iter_mut().zip(quad) {
                    *byte = quant.cast_unsigned() ^ 0x80;
                }
            }
        }
        Ok(panel)
    }

    fn decode(&self, lane: usize, values: &mut [f32; BLOCK]) {
        for (i, value) in values.iter_mut().enumerate() {
            let byte = self.quants[i / 4][4 * lane + i % 4];
            *value = self.scale[lane] * f32::from((byte ^ 0x80).cast_signed());
        }
    }
}

fn to_q8(encoding: Encoding, block: &[u8]) -> (f32, [i8; BLOCK]) {
    let half = |at: usize| f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]));
    let mut quants = [0; BLOCK];
    match encoding {
        Encoding::Q8_0 => {
            quants.iter_mut().zip(&block[2..]).for_each(|(quant, byte)| *quant = byte.cast_signed());
            (half(0), quants)
        }
        Encoding::Q4_0 => {
            for (i, &pair) in block[2..].iter().enumerate() {
                quants[i] = (pair & 15).cast_signed() - 8;
                quants[i + BLOCK / 2] = (pair >> 4).cast_signed() - 8;
            }
            (half(0), quants)
        }
        Encoding::F16 => round_to_q8(std::array::from_fn(|i| half(2 * i))),
        Encoding::F32 => {
            let words = block.as_chunks::<4>().0;
            round_to_q8(std::array::from_fn(|i| f32::from_le_bytes(words[i])))
        }
        Encoding::Q4_1 => unreachable!("Q4_1 has panels of its own"),
    }
}

fn round_to_q8(values: [f32; BLOCK]) -> (f32, [i8; BLOCK]) {
    if values.iter().any(|x| !x.is_finite()) {
        return (f32::NAN, [0; BLOCK]);
    }
    let largest = values.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    let scale = largest / 127.0;
    // A scale too small to divide by stands for weights that are zero for every purpose.
    let inverse = if scale >= f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
    (scale, values.map(|x| (x * inverse).round_ties_even() as i8))
}

/// Half precision to single: exact, subnormals included, as the processor's own conversion.
pub(crate) fn f16_to_f32(half: u16) -> f32 {
    let sign = u32::from(half & 0x8000) << 16;
    let exponent = u32::from(half >> 10) & 0x1f;
    let fraction = u32::from(half & 0x3ff);
    match exponent {
        0 => f32::from_bits(sign | (fraction as f32 * 2.0_f32.powi(-24)).to_bits()),
        0x1f => f32::from_bits(sign | 0x7f80_0000 | (fraction << 13)),
        _ => f32::from_bits(sign | ((exponent + 112) << 23) | (fraction << 13)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn halves_convert_exactly() {
        for (half, single) in
            [(0x3c00, 1.0), (0xc000, -2.0), (0x0001, 5.960_464_5e-8), (0x7bff, 65504.0), (0x8000, -0.0)]
        {
            assert_eq!(f16_to_f32(half).to_bits(), f32::to_bits(single), "{half:04x}");
        }
        assert!(f16_to_f32(0x7c00).is_infinite() && f16_to_f32(0x7e00).is_nan());
    }

    fn decoded(encoding: Encoding, bytes: &[u8], outputs: usize) -> Vec<f32> {
        let matrix = Matrix::pack(encoding, bytes, outputs, BLOCK).expect("finite");
        let mut rows = vec![0.0; outputs * BLOCK];
        rows.chunks_mut(BLOCK).enumerate().for_each(|(output, row)| matrix.decode_row(output, row));
        rows
    }

    proptest! {
        #[test]
        fn each_encoding_decodes_to_what_it_says(
            blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), BLOCK), 1..40),
        ) {
            let (scale, min) = (0x3400_u16, 0xb800_u16); // 0.25 and -0.5
            let head = |with_min: bool| {
                let mut head = scale.to_le_bytes().to_vec();
                if with_min {
                    head.extend(min.to_le_bytes());
                }
                head
            };
            let nibble = |block: &[u8], i: usize| {
                f32::from(if i < 16 { block[i] & 15 } else { block[i - 16] >> 4 })
            };
            let encode = |with_min, length: usize| -> Vec<u8> {
                blocks.iter().flat_map(|b| [&head(with_min)[..], &b[..length]].concat()).collect()
            };
            let rows = decoded(Encoding::Q4_1, &encode(true, 16), blocks.len());
            for (i, value) in rows.iter().enumerate() {
                prop_assert_eq!(*value, 0.25 * nibble(&blocks[i / 32], i % 32) - 0.5);
            }
            let rows = decoded(Encoding::Q4_0, &encode(false, 16), blocks.len());
            for (i, value) in rows.iter().enumerate() {
                prop_assert_eq!(*value, 0.25 * (nibble(&blocks[i / 32], i % 32) - 8.0));
            }
            let rows = decoded(Encoding::Q8_0, &encode(false, 32), blocks.len());
            for (i, value) in rows.iter().enumerate() {
                prop_assert_eq!(*value, 0.25 * f32::from(blocks[i / 32][i % 32].cast_signed()));
            }
        }

        #[test]
        fn plain_numbers_are_rounded_to_within_half_a_step(
            values in prop::collection::vec(-4.0_f32..4.0, BLOCK),
        ) {
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            let largest = values.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
            for (value, stored) in values.iter().zip(decoded(Encoding::F32, &bytes, 1)) {
                prop_assert!((value - stored).abs() <= largest / 127.0 * 0.501);
            }
        }
    }

    #[test]
    fn scales_that_are_no_numbers_are_refused() {
        let mut block = vec![0; 18];
        block[..2].copy_from_slice(&0x7e00_u16.to_le_bytes());
        assert_eq!(Matrix::pack(Encoding::Q4_0, &block, 1, BLOCK).err(), Some(NotFinite));
    }
}
