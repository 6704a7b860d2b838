/* MPI_Allreduce as `trainer bench-comm` measures its own: in place, f32, fresh index-dependent data in every iteration,
 * filled and checked outside of the timing, the time of an iteration being the slowest rank's. One JSON object a size.
 * With `reduce_update` a pass of SGD with momentum over all parameters, which every rank has, follows and is timed with it.
 *
 *     mpirun -np 2 allreduce OPERATION MIN_BYTES MAX_BYTES FACTOR */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned value(unsigned rank, unsigned index, unsigned iteration) {
    return (index * 7 + rank * 131 + iteration * 29) % 1024;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void sgd(float *params, float *momentum, const float *grads, long len) {
    for (long i = 0; i < len; i++) {
        momentum[i] = 0.5f * momentum[i] + grads[i];
        params[i] -= 0.5f * momentum[i];
    }
}

/* Fills `seconds` with one time an iteration; gives the number of wrong values on this rank. `params` and `momentum` are
 * NULL where there is nothing to update. */
static long measure(float *data, float *params, float *momentum, long len, int warmup, int iterations, double *seconds) {
    int rank, size;
    long wrong = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    for (int iteration = -warmup; iteration < iterations; iteration++) {
        for (long i = 0; i < len; i++) data[i] = value(rank, i, iteration + warmup);
        for (long i = 0; params && i < len; i++) {
            params[i] = value(7, i, iteration + warmup);
            momentum[i] = 4 * value(11, i, iteration + warmup);
        }
        MPI_Barrier(MPI_COMM_WORLD);
        double start = MPI_Wtime();
        MPI_Allreduce(MPI_IN_PLACE, data, len, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
        if (params) sgd(params, momentum, data, len);
        if (iteration >= 0) seconds[iteration] = MPI_Wtime() - start;
        for (long i = 0; i < len; i++) {
            unsigned sum = 0;
            for (int r = 0; r < size; r++) sum += value(r, i, iteration + warmup);
            wrong += data[i] != (float)sum;
            if (params) {
                float velocity = 2 * value(11, i, iteration + warmup) + (float)sum;
                wrong += params[i] != value(7, i, iteration + warmup) - 0.5f * velocity;
            }
        }
    }
    return wrong;
}

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    int rank, size;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    long min = argc == 5 ? atol(argv[2]) : 0, max = argc == 5 ? atol(argv[3]) : 0, factor = argc == 5 ? atol(argv[4]) : 0;
    int update = argc == 5 && strcmp(argv[1], "reduce_update") == 0;
    if (min < 4 || max < min || factor < 2 || (!update && strcmp(argv[1], "all_reduce") != 0)) {
        if (rank == 0) fprintf(stderr, "usage: mpirun -np N %s all_reduce|reduce_update MIN_BYTES MAX_BYTES FACTOR\n", argv[0]);
        MPI_Abort(MPI_COMM_WORLD, 2);
    }
    float *data = malloc(max), *params = update ? malloc(max) : NULL, *momentum = update ? malloc(max) : NULL;
    for (long bytes = min; bytes <= max; bytes *= factor) {
        long iterations = (1L << 30) / bytes;
        iterations = iterations < 10 ? 10 : iterations > 2000 ? 2000 : iterations;
        double mine[2000], slowest[2000];
        long wrong = measure(data, params, momentum, bytes / 4, iterations / 10, iterations, mine), all_wrong;
        MPI_Reduce(mine, slowest, iterations, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
        MPI_Reduce(&wrong, &all_wrong, 1, MPI_LONG, MPI_SUM, 0, MPI_COMM_WORLD);
        if (rank != 0) continue;
        qsort(slowest, iterations, sizeof(double), ascending);
        double p50 = slowest[(iterations - 1) / 2], p99 = slowest[(long)((iterations - 1) * 0.99 + 0.5)];
        double algbw = bytes / p50 / 1e9;
        printf("{\"bytes\":%ld,\"p50_us\":%.3f,\"p99_us\":%.3f,\"algbw_gb_s\":%.4f,\"busbw_gb_s\":%.4f,\"wrong\":%ld}\n",
               bytes, p50 * 1e6, p99 * 1e6, algbw, algbw * 2 * (size - 1) / size, all_wrong);
        fflush(stdout);
    }
    free(data);
    free(params);
    free(momentum);
    MPI_Finalize();
}
