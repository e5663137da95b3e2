// Records -> row-major BF16: entry points at load, then one warp for 16 rows of a tile.
//
//   nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o rans_decode rans_decode.cu
//   ./rans_decode [dump of a packed tensor ...]
#include "../kernels/rans_decode.cuh"
#include "rans_host.cuh"

using namespace lab;

template <int kWarps, int kBlocks>
static void launch(const DecodeArgs& args, int sms, cudaStream_t stream) {
    const int shared = kWarps * (kRingBytes + kDecodeStage) + (4 << args.matrix.prob_bits);
    CHECK(cudaFuncSetAttribute(decode_kernel<kWarps, kBlocks>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    decode_kernel<kWarps, kBlocks><<<sms * kBlocks, 32 * kWarps, shared, stream>>>(args);
    CHECK(cudaGetLastError());
}

static void run(const char* name, const Tensor& t, const Packed& p, cudaStream_t stream, int sms) {
    Loaded loaded = load(p);
    const size_t n = t.elems.size();
    const int copies = std::max(1, (int)(((size_t)200 << 20) / n));
    std::vector<Loaded> others;
    for (int i = 1; i < copies && i < 16; i++) others.push_back(load(p));
    std::vector<uint16_t> got(n);
    std::vector<uint16_t*> outs;
    for (size_t i = 0; i <= others.size(); i++) outs.push_back(poisoned<uint16_t>(n));
    DecodeArgs args = {loaded.matrix, outs[0], (uint64_t)t.cols};
    printf("%-22s %6dx%6d %6.3f %6.3f  load %7.1f us", name, t.rows, t.cols, p.bits(), loaded.bits, loaded.load_us);
    if (loaded.first_bad != ~0ull) printf("  BAD TILE %llx", (unsigned long long)loaded.first_bad);
    auto variant = [&](const char* label, auto go) {
        CHECK(cudaMemset(outs[0], 0xFF, 2 * n));
        go(args);
        CHECK(cudaDeviceSynchronize());
        CHECK(cudaMemcpy(got.data(), outs[0], 2 * n, cudaMemcpyDeviceToHost));
        size_t differ = 0;
        for (size_t i = 0; i < n; i++) differ += got[i] != t.elems[i];
        const double us = time_graph(stream, 2 * (int)outs.size(), [&](int i) {
            DecodeArgs a = args;
            const size_t at = i % outs.size();
            if (at) a.matrix = others[at - 1].matrix;
            a.out = outs[at];
            go(a);
        });
        printf(" | %s %7.1f us %.3f TB/s %s", label, us, 2e-6 * n / us, differ ? "DIFFER" : "same");
    };
    variant("16x2", [&](const DecodeArgs& a) { launch<16, 2>(a, sms, stream); });
    variant("24x2", [&](const DecodeArgs& a) { launch<24, 2>(a, sms, stream); });
    variant("8x6", [&](const DecodeArgs& a) { launch<8, 6>(a, sms, stream); });
    printf("\n");
    loaded.release();
    for (auto& o : others) o.release();
    for (auto o : outs) cudaFree(o);
}

int main(int argc, char** argv) {
    const bool brief = argc > 1 && !strcmp(argv[1], "--brief");
    if (brief) argc--, argv++;
    cudaDeviceProp device;
    CHECK(cudaGetDeviceProperties(&device, 0));
    const int sms = device.multiProcessorCount;
    cudaStream_t stream;
    CHECK(cudaStreamCreate(&stream));
    printf("%s, %d SMs; bits of the record and in memory; TB/s written\n", device.name, sms);
    std::random_device entropy;
    for (auto& shape : {std::pair<int, int>{176, 1104}, {16, 16}, {4096, 4096}, {28672, 4096}, {8192, 8192}}) {
        if (brief && shape.first != 28672) continue;
        Tensor t = random_weights(shape.first, shape.second, 2, entropy());
        run("random", t, pack(t), stream, sms);
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
