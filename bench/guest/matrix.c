/* A product of two matrices of doubles with SSE2 or AVX2: matrix sse2|avx2 COUNT. */

#include <immintrin.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 256 };

static double a[N][N] __attribute__((aligned(64)));
static double b[N][N] __attribute__((aligned(64)));
static double c[N][N] __attribute__((aligned(64)));

static void product_sse2(void)
{
    for (int i = 0; i < N; i++)
        for (int k = 0; k < N; k++) {
            __m128d x = _mm_set1_pd(a[i][k]);
            for (int j = 0; j < N; j += 4) {
                __m128d low = _mm_add_pd(_mm_load_pd(&c[i][j]),
                                         _mm_mul_pd(x, _mm_load_pd(&b[k][j])));
                __m128d high = _mm_add_pd(_mm_load_pd(&c[i][j + 2]),
                                          _mm_mul_pd(x, _mm_load_pd(&b[k][j + 2])));
                _mm_store_pd(&c[i][j], low);
                _mm_store_pd(&c[i][j + 2], high);
            }
        }
}

__attribute__((target("avx2"))) static void product_avx2(void)
{
    for (int i = 0; i < N; i++)
        for (int k = 0; k < N; k++) {
            __m256d x = _mm256_set1_pd(a[i][k]);
            for (int j = 0; j < N; j += 8) {
                __m256d low = _mm256_add_pd(_mm256_load_pd(&c[i][j]),
                                            _mm256_mul_pd(x, _mm256_load_pd(&b[k][j])));
                __m256d high = _mm256_add_pd(_mm256_load_pd(&c[i][j + 4]),
                                             _mm256_mul_pd(x, _mm256_load_pd(&b[k][j + 4])));
                _mm256_store_pd(&c[i][j], low);
                _mm256_store_pd(&c[i][j + 4], high);
            }
        }
}

int main(int argc, char **argv)
{
    int count = argc > 2 ? atoi(argv[2]) : 0;
    int wide = argc > 1 && !strcmp(argv[1], "avx2");

    if (count <= 0 || (!wide && strcmp(argv[1], "sse2"))) {
        fprintf(stderr, "usage: matrix sse2|avx2 COUNT\n");
        return 2;
    }
    if (wide && !__builtin_cpu_supports("avx2")) {
        printf("no avx2\n");
        return 77;
    }
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            a[i][j] = (i * 7 + j * 3) % 11 - 5;
            b[i][j] = (i * 5 + j * 2) % 13 - 6;
        }
    for (int n = 0; n < count; n++)
        if (wide)
            product_avx2();
        else
            product_sse2();
    double sum = 0;
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++)
            sum += c[i][j] * (i - j);
    printf("%.6e\n", sum);
    return 0;
}
