//! Entropy-coded weights on the GPU: loaded from a record as they are, decoded
//! inside the product.
//!
//! In device memory a matrix has the words and the raw bits of its record in the
//! order in which the lanes of a warp need them, and entry points every 16 rows x
//! 256 columns; nothing is coded anew. `docs/kernels-rans.md` describes the layout.

mod params;

use std::ops::Range;

use transom::model::FreqTable;
use transom::tile::Order;
use transom::{DecodeError, Dtype, ReadAt, Record, RecordHeader};

use crate::buffer::DeviceBuffer;
use crate::device::Device;
use crate::error::Error;
use crate::module::{Function, Launch};
use crate::product::params::{ActivationOrder, Activations};
use crate::stream::Stream;
use params::{
    BytesArgs, DECODE_WARP_BYTES, DecodeArgs, GatherArgs, LOAD_BYTES, LoadArgs, Matrix,
    ProductArgs, RAW_UNIT, ROW_BYTES, ROWS_WARP_BYTES, UNIT_COLS, product_words_bytes,
};

/// Why a record cannot be loaded or used as entropy-coded weights.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RansError {
    /// The GPU.
    #[error(transparent)]
    Gpu(#[from] Error),
    /// The record.
    #[error(transparent)]
    Record(#[from] DecodeError),
    /// The first tile whose stream is not valid, although its checksum is right.
    #[error("tile {tile}: {what}")]
    BadTile {
        /// Number of the tile.
        tile: usize,
        /// What is wrong with its stream.
        what: &'static str,
    },
    /// Not a matrix that this layout is for; keep it dense.
    #[error("{0} cannot stay entropy-coded on the GPU")]
    Unsupported(&'static str),
}

/// A result of this module.
pub type Result<T> = std::result::Result<T, RansError>;

/// What a code of `TileError` in `rans_load.cuh` means.
const fn tile_error(code: u64) -> &'static str {
    match code {
        1 => "the stream is too short, or has half a word",
        2 => "unused bits of the states are not zero",
        3 => "the words are used up before the last symbol",
        4 => "words are left over",
        5 => "a final state is not what the encoder begins with",
        _ => "unknown error",
    }
}

/// How the kernels look symbols up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lookup {
    /// A word for each slot.
    Slots,
    /// For what does not fit into such words.
    General,
    /// FP16 with two coded planes.
    TwoPlanes,
}

impl Lookup {
    const fn suffix(self) -> &'static str {
        match self {
            Self::Slots => "",
            Self::General => "_general",
            Self::TwoPlanes => "_two_planes",
        }
    }
}

/// A kernel for each [`Lookup`]; none for two planes if its elements have one byte.
#[derive(Debug)]
struct Kernels {
    slots: Function,
    general: Function,
    two_planes: Option<Function>,
}

impl Kernels {
    fn new(device: &Device, name: &str, two_planes: bool, max_shared: u32) -> Result<Self> {
        let function = |lookup: Lookup| -> Result<Function> {
            let function = device.function(&format!("{name}{}", lookup.suffix()))?;
            function.allow_shared(max_shared)?;
            Ok(function)
        };
        Ok(Self {
            slots: function(Lookup::Slots)?,
            general: function(Lookup::General)?,
            two_planes: two_planes.then(|| function(Lookup::TwoPlanes)).transpose()?,
        })
    }

    fn of(&self, lookup: Lookup) -> &Function {
        match lookup {
            Lookup::Slots => &self.slots,
            Lookup::General => &self.general,
            Lookup::TwoPlanes => self.two_planes.as_ref().expect("only FP16 has two planes"),
        }
    }
}

/// A product kernel for up to `tokens` tokens.
#[derive(Debug)]
struct Product {
    tokens: u32,
    blocks_per_sm: u32,
    dtype: Dtype,
    function: Function,
}

/// The kernels of entropy-coded weights.
#[derive(Debug)]
pub struct Rans {
    device: Device,
    load: Kernels,
    decode: Kernels,
    bytes: Kernels,
    gather: Kernels,
    gather_bytes: Kernels,
    fragments: Function,
    /// By ascending tokens, for each type.
    products: Vec<Product>,
    general_products: Vec<(Dtype, Lookup, Function)>,
}

/// A matrix in device memory, entropy-coded.
#[derive(Debug)]
pub struct RansMatrix {
    table: DeviceBuffer<u32>,
    words: DeviceBuffer<u16>,
    states: DeviceBuffer<u32>,
    positions: DeviceBuffer<u32>,
    raw: DeviceBuffer<u32>,
    dtype: Dtype,
    rows: u32,
    cols: u32,
    /// Of plane 0, and 16 times those of plane 1 if it is coded.
    prob_bits: u32,
    lookup: Lookup,
}

impl RansMatrix {
    /// Type of the elements.
    #[must_use]
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Rows.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows as usize
    }

    /// Columns.
    #[must_use]
    pub const fn cols(&self) -> usize {
        self.cols as usize
    }

    /// Bytes of device memory.
    #[must_use]
    pub const fn resident_bytes(&self) -> usize {
        self.table.n_bytes()
            + self.words.n_bytes()
            + self.states.n_bytes()
            + self.positions.n_bytes()
            + self.raw.n_bytes()
    }

    /// Words of B fragments for a product with so many tokens.
    #[must_use]
    pub const fn fragment_words(&self, tokens: usize) -> usize {
        tokens.div_ceil(8) * self.cols().div_ceil(128) * 512
    }

    fn params(&self) -> Matrix {
        Matrix {
            table: self.table.address(),
            words: self.words.address(),
            states: self.states.address(),
            positions: self.positions.address(),
            raw: if self.raw.is_empty() { 0 } else { self.raw.address() },
            rows: self.rows,
            cols: self.cols,
            prob_bits: self.prob_bits,
            table_bytes: self.table_bytes(),
            one: 1,
            f16: (self.dtype == Dtype::F16).into(),
        }
    }

    const fn table_bytes(&self) -> u32 {
        self.table.n_bytes() as u32
    }

    /// What the symbols of the table are flipped by.
    fn flip(&self) -> u32 {
        flip(self.dtype).into()
    }
}

/// The table that symbols are looked up in, as the kernels have it.
#[derive(Debug)]
pub struct RansTable {
    words: Vec<u32>,
    /// Of plane 0, and 16 times those of plane 1 if it is coded.
    prob_bits: u32,
    lookup: Lookup,
}

impl RansTable {
    /// The table for a record; those of two coded planes one after the other.
    ///
    /// # Errors
    ///
    /// [`RansError::Unsupported`] if plane 0 is not coded.
    pub fn new(header: &RecordHeader) -> Result<Self> {
        let Some(freqs) = header.table(0) else {
            return Err(RansError::Unsupported("a tensor that is not coded"));
        };
        let ranked = |freqs: &FreqTable| -> Vec<(u8, u32)> {
            let with_freq = |symbol| (symbol, freqs.freqs()[usize::from(symbol)].into());
            freqs.ranked().into_iter().map(with_freq).collect()
        };
        let prob_bits = freqs.prob_bits();
        let Some(low) = header.table(1) else {
            let (words, lookup) = make_table(prob_bits, &ranked(freqs), flip(header.dtype()));
            return Ok(Self { words, prob_bits, lookup });
        };
        let mut words = general_table(prob_bits, &ranked(freqs));
        words.extend(general_table(low.prob_bits(), &ranked(low)));
        let prob_bits = prob_bits | low.prob_bits() << 4;
        Ok(Self { words, prob_bits, lookup: Lookup::TwoPlanes })
    }

    /// The table in device memory.
    #[must_use]
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// The parameter `prob_bits` of the kernels.
    #[must_use]
    pub const fn prob_bits(&self) -> u32 {
        self.prob_bits
    }

    /// How the names of the kernels end that read such a table.
    #[must_use]
    pub const fn kernel_suffix(&self) -> &'static str {
        self.lookup.suffix()
    }
}

/// INT8 symbols have their top bit flipped, so that they ascend with the value.
fn flip(dtype: Dtype) -> u8 {
    if dtype == Dtype::I8 { 0x80 } else { 0 }
}

/// The decode table as the kernels have it. `ranked`: symbols and their frequencies,
/// by descending frequency.
fn make_table(prob_bits: u32, ranked: &[(u8, u32)], flip: u8) -> (Vec<u32>, Lookup) {
    // A table of slots of more than 32 KiB leaves too little for the rest.
    let fits = |&(_, freq): &(u8, u32)| freq < 1 << prob_bits && freq <= 1 << (24 - prob_bits);
    if prob_bits > 13 || !ranked.iter().all(fits) {
        return (general_table(prob_bits, ranked), Lookup::General);
    }
    let mut table = Vec::with_capacity(1 << prob_bits);
    for &(symbol, freq) in ranked {
        let entry = u32::from(symbol ^ flip) << prob_bits | freq;
        table.extend((0..freq).map(|offset| offset << (prob_bits + 8) | entry));
    }
    (table, Lookup::Slots)
}

/// Start and frequency of each symbol, then the symbol of each slot.
fn general_table(prob_bits: u32, ranked: &[(u8, u32)]) -> Vec<u32> {
    let (mut table, mut symbols) = (vec![0; 256], Vec::with_capacity(1 << prob_bits));
    for &(symbol, freq) in ranked {
        table[usize::from(symbol)] = (symbols.len() as u32) << 16 | freq;
        symbols.resize(symbols.len() + freq as usize, symbol);
    }
    table.extend(symbols.as_chunks::<4>().0.iter().map(|&bytes| u32::from_le_bytes(bytes)));
    table
}

impl Rans {
    /// Looks up the kernels.
    ///
    /// # Errors
    ///
    /// [`Error::NoKernel`], or what the driver reports.
    pub fn new(device: &Device) -> Result<Self> {
        let max = device.info().shared_bytes;
        let function = |name: &str| -> Result<Function> {
            let function = device.function(name)?;
            function.allow_shared(max)?;
            Ok(function)
        };
        let (mut products, mut general_products) = (Vec::new(), Vec::new());
        for (dtype, name) in [(Dtype::Bf16, "bf16"), (Dtype::F16, "f16"), (Dtype::I8, "int8")] {
            for (tokens, blocks_per_sm) in [(8, 2), (32, 1), (64, 1)] {
                let function = function(&format!("rans_product_{name}_{tokens}"))?;
                products.push(Product { tokens, blocks_per_sm, dtype, function });
            }
            let general = function(&format!("rans_product_{name}_64_general"))?;
            general_products.push((dtype, Lookup::General, general));
        }
        let two_planes = function("rans_product_f16_64_two_planes")?;
        general_products.push((Dtype::F16, Lookup::TwoPlanes, two_planes));
        Ok(Self {
            device: device.clone(),
            load: Kernels::new(device, "rans_load", true, max)?,
            decode: Kernels::new(device, "rans_decode", true, max)?,
            bytes: Kernels::new(device, "rans_decode_bytes", false, max)?,
            gather: Kernels::new(device, "rans_gather", true, max)?,
            gather_bytes: Kernels::new(device, "rans_gather_bytes", false, max)?,
            fragments: device.function("order_activations")?,
            products,
            general_products,
        })
    }

    /// Brings a record into device memory: a matrix whose sides are multiples of 16, of
    /// which plane 0 is coded. Every tile's
    /// checksum and every stream is checked; the content hash is not.
    ///
    /// # Errors
    ///
    /// A [`RansError`]; of several bad streams the first.
    ///
    /// # Cost
    ///
    /// Copies the record once in the memory of the host, and has it in device
    /// memory twice while it loads. A kernel goes through it twice: to measure the
    /// words of each unit, and to lay them. Waits for the stream.
    pub fn load(
        &self,
        stream: &Stream,
        record: &Record,
        source: &(impl ReadAt + ?Sized),
    ) -> Result<RansMatrix> {
        let header = record.header();
        let (dtype, tiling) = (header.dtype(), header.tiling());
        if tiling.order() != Order::Fragment {
            return Err(RansError::Unsupported("a tensor in linear order"));
        }
        let (rows, cols) = record.matrix_sides();
        if rows.max(cols) > 1 << 24 || rows * cols > 1 << 32 {
            return Err(RansError::Unsupported("a matrix of more than 2^32 elements"));
        }
        let RansTable { words: table, prob_bits, lookup } = RansTable::new(header)?;
        let n_planes = 1 + u32::from(lookup == Lookup::TwoPlanes);

        let (mut tiles, mut buffer) = (Vec::new(), Vec::new());
        let mut starts = vec![0_u64];
        for index in 0..tiling.n_tiles() {
            record.read_tile(source, index, &mut buffer)?;
            tiles.extend_from_slice(&buffer);
            starts.push(tiles.len() as u64);
        }

        let has_raw = dtype.elem_bytes() == 2 && n_planes == 1;
        let n_units = rows / 16 * cols.div_ceil(UNIT_COLS as usize);
        let mut matrix = RansMatrix {
            table: stream.upload(&table)?,
            words: DeviceBuffer::new(&self.device, 0)?,
            states: DeviceBuffer::new(&self.device, n_units * 32)?,
            positions: DeviceBuffer::new(&self.device, n_units + 1)?,
            raw: DeviceBuffer::new(&self.device, if has_raw { n_units * 1024 } else { 0 })?,
            dtype,
            rows: rows as u32,
            cols: cols as u32,
            prob_bits,
            lookup,
        };
        let (tiles, starts) = (stream.upload(&tiles)?, stream.upload(&starts)?);
        let first_bad = DeviceBuffer::<u64>::filled(&self.device, 1, 0xFF)?;
        let n_tiles = tiling.n_tiles() as u32;
        let launch = Launch::new(n_tiles.div_ceil(8).min(2 * self.device.info().n_sms), 256)
            .shared(8 * LOAD_BYTES * n_planes + matrix.table_bytes());
        let run = |matrix: &RansMatrix| {
            let m = matrix.params();
            let args = LoadArgs {
                tiles: tiles.address(),
                tile_starts: starts.address(),
                table: m.table,
                words: if matrix.words.is_empty() { 0 } else { m.words },
                states: m.states,
                positions: m.positions,
                raw: m.raw,
                first_bad: first_bad.address(),
                rows: m.rows,
                cols: m.cols,
                prob_bits: m.prob_bits,
                table_bytes: m.table_bytes,
                one: m.one,
                n_tiles,
                f16: m.f16,
                unused: 0,
            };
            // SAFETY: the buffers have the sizes that the kernel computes from the same
            // header and, the second time, from what it has measured; they live until
            // the stream has been waited for below.
            unsafe { self.load.of(lookup).launch(stream, launch, &args) }
        };
        run(&matrix)?;
        let found = stream.download(&first_bad)?[0];
        if found != u64::MAX {
            let (tile, what) = ((found >> 8) as usize, tile_error(found & 0xFF));
            return Err(RansError::BadTile { tile, what });
        }
        let mut positions = stream.download(&matrix.positions)?;
        let Some(n_rows) = place(&mut positions) else {
            return Err(RansError::Unsupported("a record of more than 2^31 rows of words"));
        };
        matrix.positions = stream.upload(&positions)?;
        // Not empty, for words that are read ahead.
        matrix.words = DeviceBuffer::new(&self.device, (n_rows + 1) * (ROW_BYTES as usize / 2))?;
        run(&matrix)?;
        stream.synchronize()?;
        Ok(matrix)
    }

    /// Decodes a matrix of BF16 or FP16, row-major, into `out` of rows x cols elements.
    ///
    /// # Errors
    ///
    /// Another type or length, and what the driver reports.
    pub fn decode(
        &self,
        stream: &Stream,
        matrix: &RansMatrix,
        out: &mut DeviceBuffer<u16>,
    ) -> Result<()> {
        self.decode_part(stream, matrix, 0..matrix.rows(), 0..matrix.cols(), out)
    }

    /// Decodes the elements of some rows and columns of a matrix of BF16 or FP16,
    /// row-major, into `out` of as many elements.
    ///
    /// Rows begin and end at multiples of 16, columns begin at a multiple of 256 and end
    /// at one of 16.
    ///
    /// # Errors
    ///
    /// As [`Rans::decode`]; other rows and columns, none, or beyond the matrix.
    ///
    /// # Cost
    ///
    /// Reads and decodes what is asked for.
    pub fn decode_part(
        &self,
        stream: &Stream,
        matrix: &RansMatrix,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut DeviceBuffer<u16>,
    ) -> Result<()> {
        let range = part(matrix, rows, cols)?;
        need_length("elements", out.len(), range.rows as usize * range.cols as usize)?;
        self.decode_range(self.device.info().n_sms, stream, matrix, range, out)
    }

    /// [`Rans::decode`] on a part of the GPU's SMs; `out` may be longer.
    pub(crate) fn decode_on(
        &self,
        n_sms: u32,
        stream: &Stream,
        matrix: &RansMatrix,
        out: &DeviceBuffer<u16>,
    ) -> Result<()> {
        need_length("elements", out.len(), out.len().max(matrix.rows() * matrix.cols()))?;
        let all = params::Range { row: 0, col: 0, rows: matrix.rows, cols: matrix.cols };
        self.decode_range(n_sms, stream, matrix, all, out)
    }

    /// `out`: room for the range.
    fn decode_range(
        &self,
        n_sms: u32,
        stream: &Stream,
        matrix: &RansMatrix,
        range: params::Range,
        out: &DeviceBuffer<u16>,
    ) -> Result<()> {
        need(matrix.dtype.elem_bytes() == 2, "an element type of one byte")?;
        let args = DecodeArgs {
            matrix: matrix.params(),
            out: out.address(),
            stride: range.cols.into(),
            range,
        };
        let n_units = range.rows / 16 * range.cols.div_ceil(UNIT_COLS);
        let n_blocks = (2 * n_sms).clamp(1, n_units.div_ceil(16));
        let launch =
            Launch::new(n_blocks, 512).shared(16 * DECODE_WARP_BYTES + matrix.table_bytes());
        // SAFETY: `out` has room for every element; freeing buffers waits for the kernel.
        unsafe { self.decode.of(matrix.lookup).launch(stream, launch, &args)? };
        Ok(())
    }

    /// Decodes a matrix of one-byte elements, row-major.
    ///
    /// # Errors
    ///
    /// As [`Rans::decode`].
    pub fn decode_bytes(
        &self,
        stream: &Stream,
        matrix: &RansMatrix,
        out: &mut DeviceBuffer<u8>,
    ) -> Result<()> {
        self.decode_bytes_part(stream, matrix, 0..matrix.rows(), 0..matrix.cols(), out)
    }

    /// Decodes a part of a matrix of one-byte elements, row-major.
    ///
    /// # Errors
    ///
    /// As [`Rans::decode_part`].
    pub fn decode_bytes_part(
        &self,
        stream: &Stream,
        matrix: &RansMatrix,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut DeviceBuffer<u8>,
    ) -> Result<()> {
        need(matrix.dtype.elem_bytes() == 1, "an element type of two bytes")?;
        let range = part(matrix, rows, cols)?;
        need_length("elements", out.len(), range.rows as usize * range.cols as usize)?;
        let args = BytesArgs {
            matrix: matrix.params(),
            out: out.address(),
            range,
            flip: matrix.flip(),
            unused: 0,
        };
        let n_units = range.rows / 16 * range.cols.div_ceil(UNIT_COLS);
        let n_blocks = (4 * self.device.info().n_sms).min(n_units.div_ceil(8));
        let launch = Launch::new(n_blocks, 256).shared(8 * ROWS_WARP_BYTES + matrix.table_bytes());
        // SAFETY: `out` has room for every element; freeing buffers waits for the kernel.
        unsafe { self.bytes.of(matrix.lookup).launch(stream, launch, &args)? };
        Ok(())
    }

    /// Rows of a matrix of BF16 or FP16: `out[i]` becomes row `ids[i]`; a row whose
    /// number is not below the matrix's rows is left alone.
    ///
    /// # Errors
    ///
    /// As [`Rans::decode`].
    ///
    /// # Cost
    ///
    /// Decodes 16 rows for each.
    pub fn gather(
        &self,
        stream: &Stream,
        matrix: &RansMatrix,
        ids: &DeviceBuffer<u32>,
        out: &mut DeviceBuffer<u16>,
    ) -> Result<()> {
        need(matrix.dtype.elem_bytes() == 2, "an element type of one byte")?;
        need_length("elements", out.len(), ids.len() * matrix.cols())?;
        self.gather_any(stream, &self.gather, matrix, ids, out.address())
    }

    /// Rows of a matrix of one-byte elements, as [`Rans::gather`].
    ///
    /// # Errors
    ///
    /// As [`Rans::decode`].
    pub fn gather_bytes(
        &self,
        stream: &Stream,
        matrix: &RansMatrix,
        ids: &DeviceBuffer<u32>,
        out: &mut DeviceBuffer<u8>,
    ) -> Result<()> {
        need(matrix.dtype.elem_bytes() == 1, "an element type of two bytes")?;
        need_length("elements", out.len(), ids.len() * matrix.cols())?;
        self.gather_any(stream, &self.gather_bytes, matrix, ids, out.address())
    }

    /// `out`: room for a row for each id.
    fn gather_any(
        &self,
        stream: &Stream,
        kernels: &Kernels,
        matrix: &RansMatrix,
        ids: &DeviceBuffer<u32>,
        out: u64,
    ) -> Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        let args = GatherArgs {
            matrix: matrix.params(),
            ids: ids.address(),
            out,
            n_ids: ids.len() as u32,
            flip: matrix.flip(),
        };
        let n_tasks = ids.len() as u32 * matrix.cols.div_ceil(UNIT_COLS);
        let launch = Launch::new((4 * self.device.info().n_sms).min(n_tasks.div_ceil(8)), 256)
            .shared(8 * ROWS_WARP_BYTES + matrix.table_bytes());
        // SAFETY: `out` has a row for each id, and the kernel skips ids beyond the
        // matrix; freeing buffers waits for the kernel.
        unsafe { kernels.of(matrix.lookup).launch(stream, launch, &args)? };
        Ok(())
    }

    /// `y = x * W^T + bias`: `x` is `[tokens][cols]`, `y` `[tokens][rows]`, of BF16 for BF16
    /// weights and otherwise FP16; see [`Rans::product`] for the others. `scratch`: at
    /// least [`RansMatrix::fragment_words`].
    ///
    /// # Errors
    ///
    /// As [`Rans::product`].
    #[allow(clippy::too_many_arguments)]
    pub fn run(
        &self,
        stream: &Stream,
        matrix: &RansMatrix,
        x: &DeviceBuffer<u16>,
        tokens: usize,
        scales: Option<&DeviceBuffer<f32>>,
        bias: Option<&DeviceBuffer<u16>>,
        y: &mut DeviceBuffer<u16>,
        scratch: &mut DeviceBuffer<u32>,
    ) -> Result<()> {
        need((1..=64).contains(&tokens), "a product of no tokens or more than 64")?;
        let n_words = matrix.fragment_words(tokens);
        need_length("activations", x.len(), tokens * matrix.cols())?;
        need_length("words of scratch", scratch.len(), scratch.len().max(n_words))?;
        let args = Activations {
            x: x.address(),
            out: scratch.address(),
            cols: matrix.cols,
            tokens: tokens as u32,
            order: ActivationOrder::Fragments as u32,
            unused: 0,
        };
        let launch = Launch::new((n_words / 4).div_ceil(256) as u32, 256);
        // SAFETY: the lengths were checked above; freeing buffers waits for the kernel.
        unsafe { self.fragments.launch(stream, launch, &args)? };
        self.product(stream, matrix, scratch, tokens, scales, bias, y)
    }

    /// `y[tokens, rows] = x[tokens, cols] * W^T + bias`, in FP32, rounded to BF16 (BF16
    /// weights) or FP16 (FP16, and INT8 dequantised as `f16(q * scale)`).
    ///
    /// `x` are the B fragments that the kernel `order_activations` makes, at least
    /// [`RansMatrix::fragment_words`]. `scales` (INT8): one, or one a row. `bias`: one a row,
    /// of the type of `y`.
    ///
    /// # Errors
    ///
    /// More than 64 tokens, another type, wrong lengths, and what the driver reports.
    #[allow(clippy::too_many_arguments)]
    pub fn product(
        &self,
        stream: &Stream,
        matrix: &RansMatrix,
        x: &DeviceBuffer<u32>,
        tokens: usize,
        scales: Option<&DeviceBuffer<f32>>,
        bias: Option<&DeviceBuffer<u16>>,
        y: &mut DeviceBuffer<u16>,
    ) -> Result<()> {
        let int8 = matrix.dtype == Dtype::I8;
        need(
            matches!(matrix.dtype, Dtype::Bf16 | Dtype::F16 | Dtype::I8),
            "an element type other than BF16, FP16 and INT8",
        )?;
        need(int8 == scales.is_some(), "INT8 without scales, or another type with scales,")?;
        need((1..=64).contains(&tokens), "a product of no tokens or more than 64")?;
        need_length("words of x", x.len(), x.len().max(matrix.fragment_words(tokens)))?;
        need_length("elements of y", y.len(), tokens * matrix.rows())?;
        let n_scales = scales.map_or(1, DeviceBuffer::len);
        if n_scales != 1 {
            need_length("scales", n_scales, matrix.rows())?;
        }
        if let Some(bias) = bias {
            need_length("biases", bias.len(), matrix.rows())?;
        }
        let slices = matrix.cols.div_ceil(UNIT_COLS).clamp(1, 16);
        let args = ProductArgs {
            matrix: matrix.params(),
            twin: 0,
            x: x.address(),
            scales: scales.map_or(0, DeviceBuffer::address),
            bias: bias.map_or(0, DeviceBuffer::address),
            y: y.address(),
            tokens: tokens as u32,
            slices,
            scale_step: u32::from(n_scales != 1),
            stride: matrix.rows,
        };
        let (function, most, blocks_per_sm) = if matrix.lookup != Lookup::Slots {
            let wanted = (matrix.dtype, matrix.lookup);
            let found = self.general_products.iter().find(|(d, l, _)| (*d, *l) == wanted);
            (&found.expect("there is one for each type").2, 64, 1)
        } else {
            let product = (self.products.iter())
                .find(|p| p.dtype == matrix.dtype && p.tokens >= args.tokens)
                .expect("there is one for 64 tokens");
            (&product.function, product.tokens, product.blocks_per_sm)
        };
        let shared = 2 * 16 * most * 64
            + 16 * product_words_bytes(int8, matrix.lookup == Lookup::TwoPlanes)
            + matrix.table_bytes();
        let per_block = 16 / slices;
        let n_blocks =
            (blocks_per_sm * self.device.info().n_sms).min((matrix.rows / 16).div_ceil(per_block));
        let launch = Launch::new(n_blocks, 512).shared(shared);
        // SAFETY: the lengths are checked above; freeing buffers waits for the kernel.
        unsafe { function.launch(stream, launch, &args)? };
        Ok(())
    }
}

/// Rows of words of each unit -> number of the first, for every unit and the end.
/// Returns how many there are.
fn place(positions: &mut [u32]) -> Option<usize> {
    let (last, units) = positions.split_last_mut()?;
    let mut next = 0_u32;
    for position in units {
        let (n_rows, flag) = (*position & !RAW_UNIT, *position & RAW_UNIT);
        *position = next | flag;
        next = next.checked_add(n_rows).filter(|&next| next < RAW_UNIT)?;
    }
    *last = next;
    Some(next as usize)
}

/// A part that [`Rans::decode_part`] can decode.
fn part(matrix: &RansMatrix, rows: Range<usize>, cols: Range<usize>) -> Result<params::Range> {
    let inside = rows.start < rows.end
        && rows.end <= matrix.rows()
        && cols.start < cols.end
        && cols.end <= matrix.cols();
    let aligned = rows.start.is_multiple_of(16)
        && rows.end.is_multiple_of(16)
        && cols.start.is_multiple_of(UNIT_COLS as usize)
        && cols.end.is_multiple_of(16);
    need(inside, "a part beyond the matrix, or an empty one,")?;
    need(aligned, "a part that does not begin and end at whole blocks")?;
    Ok(params::Range {
        row: rows.start as u32,
        col: cols.start as u32,
        rows: rows.len() as u32,
        cols: cols.len() as u32,
    })
}

fn need(condition: bool, what: &'static str) -> Result<()> {
    if condition { Ok(()) } else { Err(RansError::Unsupported(what)) }
}

fn need_length(what: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::Length { what, found, expected }.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_the_fast_table_fit_their_fields() {
        let (table, lookup) = make_table(12, &[(127, 2000), (126, 2096 - 1), (3, 1)], 0);
        assert_eq!(lookup, Lookup::Slots);
        assert_eq!(table.len(), 4096);
        assert_eq!(table[0], 127 << 12 | 2000);
        assert_eq!(table[2000 + 7], 7 << 20 | 126 << 12 | 2095);
        assert_eq!(table[4095], 3 << 12 | 1);
    }

    #[test]
    fn what_does_not_fit_takes_the_general_table() {
        // One symbol; an offset too long for its field; a table too long for shared memory.
        for (prob_bits, ranked) in [
            (12, vec![(5, 4096)]),
            (13, vec![(5, 4096), (6, 4096)]),
            (14, (0..=255).map(|s| (s, 64)).collect()),
        ] {
            let (table, lookup) = make_table(prob_bits, &ranked, 0x80);
            assert_eq!(lookup, Lookup::General, "{prob_bits}");
            assert_eq!(table.len() * 4, 1024 + (1 << prob_bits));
            // Symbols are not flipped here; the kernel does it.
            assert_eq!(table[usize::from(ranked[0].0)], ranked[0].1);
            let bytes: Vec<u8> = table[256..].iter().flat_map(|w| w.to_le_bytes()).collect();
            assert_eq!(bytes[0], ranked[0].0);
        }
    }
    #[test]
    fn units_lie_one_after_another() {
        let mut positions = [3, 64 | RAW_UNIT, 0, 5, 77];
        assert_eq!(place(&mut positions), Some(72));
        assert_eq!(positions, [0, 3 | RAW_UNIT, 67, 67, 72]);
        assert_eq!(place(&mut [RAW_UNIT - 1, 1, 0]), None);
    }
}
