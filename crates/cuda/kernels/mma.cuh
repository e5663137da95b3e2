// Matrix instructions: 16 rows of weights a warp, in A fragments.
#pragma once

#include <cstdint>

namespace transom {

#ifdef __CUDACC__

/// 8 tokens: c[4] += a[4] * b, one k16 step.
template <bool kHalf>
__device__ __forceinline__ void mma(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
    if constexpr (kHalf)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TRANSOM_WGMMA 1
#else
#define TRANSOM_WGMMA 0
#endif

/// Activations in shared memory are core matrices of 8 tokens x 16 bytes, 128
/// bytes apart along K and 2048 along tokens.
constexpr uint32_t kCoreAlongK = 128, kCoreAlongTokens = 2048;

#if TRANSOM_WGMMA
/// Low word of the descriptor of activations at a shared address.
__device__ __forceinline__ uint32_t activation_descriptor(uint32_t address) { return address >> 4 | (kCoreAlongK >> 4) << 16; }
/// Of those `n_bytes` further on. The words are apart: a sum of 64 bits would be one of vector registers.
__device__ __forceinline__ uint64_t further(uint32_t descriptor, uint32_t n_bytes) {
    uint64_t out;
    asm("mov.b64 %0, {%1, %2};" : "=l"(out) : "r"(descriptor + n_bytes / 16), "n"(kCoreAlongTokens >> 4));
    return out;
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Until no more than so many groups of products go on.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_but() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void wgmma_wait() { wgmma_wait_but<0>(); }

#define TRANSOM_ACC(g) "+f"(c[g][0]), "+f"(c[g][1]), "+f"(c[g][2]), "+f"(c[g][3])
#define TRANSOM_WGMMA_32(type)                                                                                                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                                                              \
                 " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15},{%16,%17,%18,%19},%20,1,1,1,0;"                                \
                 : TRANSOM_ACC(0), TRANSOM_ACC(1), TRANSOM_ACC(2), TRANSOM_ACC(3)                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define TRANSOM_WGMMA_64(type)                                                                                                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                              \
                 " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}," \
                 "{%32,%33,%34,%35},%36,1,1,1,0;"                                                                                         \
                 : TRANSOM_ACC(0), TRANSOM_ACC(1), TRANSOM_ACC(2), TRANSOM_ACC(3), TRANSOM_ACC(4), TRANSOM_ACC(5), TRANSOM_ACC(6),         \
                   TRANSOM_ACC(7)                                                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

#define TRANSOM_ACC8(g) \
    TRANSOM_ACC(g), TRANSOM_ACC(g + 1), TRANSOM_ACC(g + 2), TRANSOM_ACC(g + 3), TRANSOM_ACC(g + 4), TRANSOM_ACC(g + 5), TRANSOM_ACC(g + 6), TRANSOM_ACC(g + 7)
#define TRANSOM_WGMMA_128(type)                                                                                                                       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                                         \
                 " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"                                           \
                 "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"                                   \
                 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"                                                                  \
                 "{%64,%65,%66,%67},%68,1,1,1,0;"                                                                                                     \
                 : TRANSOM_ACC8(0), TRANSOM_ACC8(8)                                                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define TRANSOM_WGMMA_256(type)                                                                                                                       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                                                         \
                 " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"                                           \
                 "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"                                   \
                 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,"                                   \
                 "%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"                                   \
                 "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,"               \
                 "%120,%121,%122,%123,%124,%125,%126,%127},"                                                                                          \
                 "{%128,%129,%130,%131},%132,1,1,1,0;"                                                                                                \
                 : TRANSOM_ACC8(0), TRANSOM_ACC8(8), TRANSOM_ACC8(16), TRANSOM_ACC8(24)                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

/// One k16 step of four warps' 16 rows each, all tokens.
template <bool kHalf, int kTokens8>
__device__ __forceinline__ void wgmma(float (*c)[4], const uint32_t* a, uint64_t b) {
    static_assert(kTokens8 == 4 || kTokens8 == 8 || kTokens8 == 16 || kTokens8 == 32, "");
    if constexpr (kTokens8 == 4) {
        if constexpr (kHalf) TRANSOM_WGMMA_32("f16");
        else TRANSOM_WGMMA_32("bf16");
    } else if constexpr (kTokens8 == 8) {
        if constexpr (kHalf) TRANSOM_WGMMA_64("f16");
        else TRANSOM_WGMMA_64("bf16");
    } else if constexpr (kTokens8 == 16) {
        if constexpr (kHalf) TRANSOM_WGMMA_128("f16");
        else TRANSOM_WGMMA_128("bf16");
    } else {
        if constexpr (kHalf) TRANSOM_WGMMA_256("f16");
        else TRANSOM_WGMMA_256("bf16");
    }
}
#endif  // TRANSOM_WGMMA

#endif  // __CUDACC__

}  // namespace transom
