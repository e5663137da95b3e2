// Records -> row-major BF16: entry points at load, then one warp for 16 rows of a tile.
//
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o rans_decode rans_decode.cu
//   ./rans_decode [dump of a packed tensor ...]
#include "../kernels/rans_decode.cuh"
#include "rans_host.cuh"

using namespace lab;

template <class AnyTable, int kWarps, int kBlocks>
__global__ void __launch_bounds__(32 * kWarps, kBlocks) decode_kernel(const __grid_constant__ DecodeArgs args) {
    decode_body<AnyTable, kWarps>(args);
}

template <class AnyTable, int kWarps, int kBlocks>
static void launch(const DecodeArgs& args, int sms, cudaStream_t stream) {
    const int shared = kWarps * kDecodeWarpBytes + (int)AnyTable::shared_bytes(args.matrix);
    CHECK(cudaFuncSetAttribute(decode_kernel<AnyTable, kWarps, kBlocks>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    decode_kernel<AnyTable, kWarps, kBlocks><<<sms * kBlocks, 32 * kWarps, shared, stream>>>(args);
    CHECK(cudaGetLastError());
}

static void run(const char* name, const Tensor& t, const Packed& p, cudaStream_t stream, int sms, Lookup lookup = kSlots) {
    const size_t n = t.elems.size();
    const int copies = std::max(1, std::min(16, (int)(((size_t)200 << 20) / n)));
    std::vector<Loaded> loaded;
    std::vector<uint16_t*> outs;
    for (int i = 0; i < copies; i++) loaded.push_back(load(p, lookup)), outs.push_back(poisoned<uint16_t>(n));
    std::vector<uint16_t> got(n);
    printf("%-22s %6dx%6d %6.3f %6.3f %s load %7.1f us", name, t.rows, t.cols, p.bits(), loaded[0].bits, loaded[0].lookup == kGeneral ? "general" : "slots  ", loaded[0].load_us);
    if (loaded[0].first_bad != ~0ull) { printf("  BAD TILE %llx\n", (unsigned long long)loaded[0].first_bad); return; }
    auto variant = [&](const char* label, auto go) {
        CHECK(cudaMemset(outs[0], 0xFF, 2 * n));
        DecodeArgs args = {loaded[0].matrix, outs[0], (uint64_t)t.cols};
        go(args);
        CHECK(cudaDeviceSynchronize());
        CHECK(cudaMemcpy(got.data(), outs[0], 2 * n, cudaMemcpyDeviceToHost));
        size_t differ = 0;
        for (size_t i = 0; i < n; i++) differ += got[i] != t.elems[i];
        const double us = time_graph(stream, 2 * copies, [&](int i) { go(DecodeArgs{loaded[i % copies].matrix, outs[i % copies], (uint64_t)t.cols}); });
        printf(" | %s %7.1f us %.3f TB/s %s", label, us, 2e-6 * n / us, differ ? "DIFFER" : "same");
    };
    if (loaded[0].lookup == kGeneral) {
        variant("16x2", [&](const DecodeArgs& a) { launch<General, 16, 2>(a, sms, stream); });
    } else {
        variant("16x2", [&](const DecodeArgs& a) { launch<Slots, 16, 2>(a, sms, stream); });
    }
    printf("\n");
    for (auto& l : loaded) l.release();
    for (auto o : outs) cudaFree(o);
}

int main(int argc, char** argv) {
    const bool brief = argc > 1 && !strcmp(argv[1], "--brief");
    const bool small = argc > 1 && !strcmp(argv[1], "--small");
    if (brief || small) argc--, argv++;
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    const int sms = device.multiProcessorCount;
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    printf("%s, %d SMs; bits of the record and in memory; TB/s written\n", device.name, sms);
    std::random_device entropy;
    for (auto& shape : {std::pair<int, int>{176, 1104}, {16, 16}, {4096, 4096}, {28672, 4096}, {8192, 8192}}) {
        if ((brief && shape.first != 28672) || (small && shape.first > 1024)) continue;
        Tensor t = random_weights(shape.first, shape.second, 2, entropy());
        run("random", t, pack(t), stream, sms);
    }
    if (!brief) {
        // The general table; one symbol; tiles that are not coded; every bit pattern.
        Tensor t = random_weights(1040, 1168, 2, entropy());
        run("random, general", t, pack(t), stream, sms, kGeneral);
        for (auto& e : t.elems) e = (uint16_t)(e & 0x807F) | 0x3F80;
        run("one exponent", t, pack(t), stream, sms);
        std::mt19937 rng(entropy());
        for (size_t i = 0; i < t.elems.size(); i++) t.elems[i] = (uint16_t)rng();
        run("every bit pattern", t, pack(t), stream, sms);
        t = random_weights(1040, 1168, 2, entropy());
        Packed p = pack(t);
        for (int row = 128; row < 256; row++)
            for (int col = 512; col < 1024; col++) t.elems[(size_t)row * 1168 + col] = (uint16_t)rng();
        make_raw(t, p, 1 * 3 + 1);
        run("a tile that is raw", t, p, stream, sms);
        for (int row = 256; row < 512; row++)
            for (int col = 0; col < 1168; col++) t.elems[(size_t)row * 1168 + col] = (uint16_t)(rng() & 0x807F) | (uint16_t)(100 + rng() % 40) << 7;
        run("many words in places", t, pack(t), stream, sms);
        t = random_weights(1040, 1168, 2, entropy());
        run("prob_bits 14", t, pack(t, 14), stream, sms);
    }
    for (int i = 1; i < argc; i++) {
        Tensor t;
        Packed p;
        if (!read_dump(argv[i], t, p)) { printf("cannot read %s\n", argv[i]); return 1; }
        const char* name = strrchr(argv[i], '/') ? strrchr(argv[i], '/') + 1 : argv[i];
        if (t.elem_bytes != 2) continue;
        run(name, t, p, stream, sms);
        if (t.rows % 128 == 0) {
            stack(t, p, std::max(1, (int)(100000000 / t.elems.size())));
            run(name, t, p, stream, sms);
        }
    }
    if (brief) return 0;
    // Damaged streams: the first bad tile is reported, and nothing else is touched.
    Tensor t = random_weights(512, 1024, 2, 1);
    Packed p = pack(t);
    int reported = 0, clean = 0;
    for (int i = 0; i < 200; i++) {
        Packed bad = p;
        const size_t tile = entropy() % (p.starts.size() - 1), n_stream = p.starts[tile + 1] - p.starts[tile] - 65536;
        bad.tiles[p.starts[tile] + entropy() % n_stream] ^= (uint8_t)(1 << entropy() % 8);
        Loaded l = load(bad);
        if (l.first_bad == ~0ull) clean++;
        else if (l.first_bad >> 8 == tile) reported++;
        l.release();
    }
    printf("damaged streams: %d of 200 reported with their tile, %d undetected by the stream's own checks\n", reported, clean);
    return 0;
}
