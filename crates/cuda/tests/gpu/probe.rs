//! The layer between Rust and the GPU, tried with kernels of known answers.

use transom_cuda::{DeviceBuffer, Error, Probe, count};

use crate::{Gpu, Random};

#[test]
fn copies_there_and_back_are_exact() {
    let Some(gpu) = Gpu::open() else { return };
    let words = Random::fresh().words(100_003);
    let buffer = gpu.stream.upload(&words).unwrap();
    let mut other = DeviceBuffer::filled(&gpu.device, words.len(), 0xFF).unwrap();
    gpu.stream.copy(&buffer, &mut other).unwrap();
    drop(buffer);
    assert_eq!(gpu.stream.download(&other).unwrap(), words);
    gpu.stream.fill(&mut other, 0x5A).unwrap();
    assert!(gpu.stream.download(&other).unwrap().iter().all(|&word| word == 0x5A5A_5A5A));
}

#[test]
fn buffers_are_filled_before_anything_uses_them() {
    let Some(gpu) = Gpu::open() else { return };
    for byte in [0, 0xFF] {
        let buffer = DeviceBuffer::<u8>::filled(&gpu.device, 1 << 26, byte).unwrap();
        assert!(gpu.stream.download(&buffer).unwrap().iter().all(|&found| found == byte));
    }
    let empty = DeviceBuffer::<u32>::new(&gpu.device, 0).unwrap();
    assert!(gpu.stream.download(&empty).unwrap().is_empty());
}

#[test]
fn a_kernel_computes_what_it_should() {
    let Some(gpu) = Gpu::open() else { return };
    let probe = Probe::new(&gpu.device).unwrap();
    let mut random = Random::fresh();
    for n in [4, 1024, 1_000_004] {
        let words = random.words(n);
        let from = gpu.stream.upload(&words).unwrap();
        let mut to = DeviceBuffer::filled(&gpu.device, n, 0xFF).unwrap();
        probe.xor(&gpu.stream, &from, &mut to, 0x1234_5678, false).unwrap();
        let expected: Vec<u32> = words.iter().map(|word| word ^ 0x1234_5678).collect();
        assert!(gpu.stream.download(&to).unwrap() == expected, "{n} words");
        assert!(gpu.stream.download(&from).unwrap() == words, "the source changed");
    }
}

#[test]
fn a_kernel_may_have_more_than_48_kib_of_shared_memory() {
    let Some(gpu) = Gpu::open() else { return };
    let probe = Probe::new(&gpu.device).unwrap();
    let words = Random::fresh().words(64 * 1024);
    let from = gpu.stream.upload(&words).unwrap();
    let mut to = DeviceBuffer::filled(&gpu.device, words.len(), 0xFF).unwrap();
    probe.reverse(&gpu.stream, &from, &mut to).unwrap();
    let expected: Vec<u32> =
        words.chunks(1024).flat_map(|block| block.chunks(4).rev().flatten().copied()).collect();
    assert!(gpu.stream.download(&to).unwrap() == expected);
}

#[test]
fn the_read_kernel_reads_everything() {
    let Some(gpu) = Gpu::open() else { return };
    let probe = Probe::new(&gpu.device).unwrap();
    let n_sums = probe.n_sums();
    // Full rounds, a part of one, and a piece over.
    let words = Random::fresh().words(n_sums * 19 + n_sums / 2 + 4);
    let from = gpu.stream.upload(&words).unwrap();
    let mut sums = DeviceBuffer::filled(&gpu.device, n_sums, 0xFF).unwrap();
    probe.read(&gpu.stream, &from, &mut sums).unwrap();
    let mut expected = vec![0; n_sums];
    words.iter().enumerate().for_each(|(i, word)| expected[i % n_sums] ^= word);
    assert!(gpu.stream.download(&sums).unwrap() == expected);
}

#[test]
fn dependent_launches_and_graphs_keep_the_order() {
    let Some(gpu) = Gpu::open() else { return };
    let probe = Probe::new(&gpu.device).unwrap();
    let words = Random::fresh().words(1 << 20);
    let mut a = gpu.stream.upload(&words).unwrap();
    let mut b = DeviceBuffer::filled(&gpu.device, words.len(), 0xFF).unwrap();
    // Each kernel reads what the one ahead of it writes.
    let mut work = |stream: &transom_cuda::Stream| {
        for i in 0..10 {
            probe.xor(stream, &a, &mut b, 1 << (2 * i), true)?;
            probe.xor(stream, &b, &mut a, 1 << (2 * i + 1), true)?;
        }
        Ok(())
    };
    // SAFETY: the buffers outlive the graph.
    let graph = unsafe { gpu.stream.capture(&mut work) }.unwrap();
    for replay in 1..=3 {
        graph.launch(&gpu.stream).unwrap();
        let key = if replay % 2 == 1 { (1 << 20) - 1 } else { 0 };
        let found = gpu.stream.download(&a).unwrap();
        assert!(
            found.iter().zip(&words).all(|(found, word)| *found == word ^ key),
            "replay {replay}"
        );
    }
}

#[test]
fn a_capture_that_fails_leaves_the_stream_usable() {
    let Some(gpu) = Gpu::open() else { return };
    let from = DeviceBuffer::<u32>::new(&gpu.device, 8).unwrap();
    let mut to = DeviceBuffer::<u32>::new(&gpu.device, 4).unwrap();
    // SAFETY: nothing is captured.
    let failed = unsafe { gpu.stream.capture(|stream| stream.copy(&from, &mut to)) };
    assert!(matches!(failed, Err(Error::Length { found: 8, expected: 4, .. })));
    assert_eq!(
        gpu.stream.upload(&[1_u32, 2]).and_then(|b| gpu.stream.download(&b)).unwrap(),
        [1, 2]
    );
}

#[test]
fn streams_wait_for_events() {
    let Some(gpu) = Gpu::open() else { return };
    let other = gpu.device.stream().unwrap();
    let n = 1 << 24;
    let mut a = DeviceBuffer::<u32>::filled(&gpu.device, n, 1).unwrap();
    let mut b = DeviceBuffer::<u32>::filled(&gpu.device, n, 2).unwrap();
    let event = transom_cuda::Event::new(&gpu.device).unwrap();
    gpu.stream.fill(&mut a, 7).unwrap();
    gpu.stream.record(&event).unwrap();
    other.wait(&event).unwrap();
    other.copy(&a, &mut b).unwrap();
    assert!(other.download(&b).unwrap().iter().all(|&word| word == 0x0707_0707));
}

#[test]
fn what_is_not_there_is_an_error() {
    let Some(gpu) = Gpu::open() else { return };
    assert!(
        matches!(gpu.device.function("no_such_kernel"), Err(Error::NoKernel(name)) if name == "no_such_kernel")
    );
    let n = count().unwrap();
    let error = transom_cuda::Device::open(n).unwrap_err();
    assert_eq!(error, Error::NoSuchGpu { ordinal: n, count: n });
}
