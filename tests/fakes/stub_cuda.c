/* A libcuda.so.1 without a GPU: it answers the dozen calls that green contexts need, so that cuda-bindings
 * runs for real. Settings come from the environment:
 *   STUB_SMS      SMs of the device (132)
 *   STUB_GROUPS   most groups of 8 that it yields (15, as measured on one H100: 15 x 8 and 12 left over)
 *   STUB_VERSION  CUDA version of the driver (13000)
 *   STUB_FAIL     "function=status": that function answers this status
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_DEVICE = 101, NOT_FOUND = 500, COARSE = 8, FINE = 2 };

typedef struct { /* CUdevResource of cuda.h: kind, padding, SM counts, room for other kinds */
    int type;
    unsigned char padding[92];
    struct { unsigned count, least, alignment; } sm;
    unsigned char oversize[48 - 12];
} Resource;

typedef struct { unsigned sms; } Green;

static unsigned setting(const char *name, unsigned otherwise) {
    const char *text = getenv(name);
    return text ? (unsigned)atoi(text) : otherwise;
}

static int status(const char *function) {
    const char *fail = getenv("STUB_FAIL");
    size_t length = strlen(function);
    return fail && !strncmp(fail, function, length) && fail[length] == '=' ? atoi(fail + length + 1) : SUCCESS;
}

static Resource resource(unsigned sms) {
    Resource made = {.type = 1, .sm = {sms, COARSE, COARSE}};
    return made;
}

static int init(unsigned flags) { (void)flags; return status("cuInit"); }
static int version(int *out) { *out = (int)setting("STUB_VERSION", 13000); return status("cuDriverGetVersion"); }
static int device_get(int *out, int number) { *out = number; return number ? INVALID_DEVICE : status("cuDeviceGet"); }
static int retain(void **out, int device) { (void)device; *out = (void *)8; return status("cuDevicePrimaryCtxRetain"); }

static int name(char *out, int length, int device) {
    (void)device;
    snprintf(out, (size_t)length, "Stub GPU");
    return status("cuDeviceGetName");
}

static int device_resource(int device, Resource *out, int type) {
    (void)device, (void)type;
    *out = resource(setting("STUB_SMS", 132));
    return status("cuDeviceGetDevResource");
}

static int split(Resource *result, unsigned *number, const Resource *input, Resource *rest, unsigned flags, unsigned least) {
    unsigned step = flags == 1 ? FINE : COARSE;
    unsigned size = (least + step - 1) / step * step; /* requests round up */
    unsigned most = size ? input->sm.count / size : 0;
    if (flags == 0 && most > setting("STUB_GROUPS", 15)) most = setting("STUB_GROUPS", 15);
    if (!result) { *number = most; return status("cuDevSmResourceSplitByCount"); }
    if (*number > most) *number = most;
    for (unsigned i = 0; i < *number; i++) result[i] = resource(size);
    if (rest) *rest = resource(input->sm.count - *number * size);
    return status("cuDevSmResourceSplitByCount");
}

static int describe(void **out, const Resource *resources, unsigned number) {
    Green *made = calloc(1, sizeof *made);
    for (unsigned i = 0; i < number; i++) made->sms += resources[i].sm.count;
    *out = made;
    return number ? status("cuDevResourceGenerateDesc") : INVALID_VALUE;
}

static int green_create(void **out, void *description, int device, unsigned flags) {
    (void)device;
    *out = description;
    return flags == 1 ? status("cuGreenCtxCreate") : INVALID_VALUE; /* CU_GREEN_CTX_DEFAULT_STREAM is required */
}

static int green_resource(void *green, Resource *out, int type) {
    (void)type;
    *out = resource(((Green *)green)->sms);
    return status("cuGreenCtxGetDevResource");
}

static int stream_create(void **out, void *green, unsigned flags, int priority) {
    (void)green, (void)priority;
    *out = malloc(1);
    return flags == 1 ? status("cuGreenCtxStreamCreate") : INVALID_VALUE; /* CU_STREAM_NON_BLOCKING is required */
}

static const struct { const char *name; void *function; } TABLE[] = {
    {"cuInit", init},
    {"cuDriverGetVersion", version},
    {"cuDeviceGet", device_get},
    {"cuDeviceGetName", name},
    {"cuDevicePrimaryCtxRetain", retain},
    {"cuDeviceGetDevResource", device_resource},
    {"cuDevSmResourceSplitByCount", split},
    {"cuDevResourceGenerateDesc", describe},
    {"cuGreenCtxCreate", green_create},
    {"cuGreenCtxGetDevResource", green_resource},
    {"cuGreenCtxStreamCreate", stream_create},
};

int cuGetProcAddress_v2(const char *symbol, void **out, int cuda, unsigned long long flags, int *found) {
    (void)cuda, (void)flags;
    for (size_t i = 0; i < sizeof TABLE / sizeof *TABLE; i++)
        if (!strcmp(symbol, TABLE[i].name)) {
            *out = TABLE[i].function;
            if (found) *found = 0;
            return SUCCESS;
        }
    *out = NULL;
    if (found) *found = 1;
    return NOT_FOUND;
}
