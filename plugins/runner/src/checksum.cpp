#include "checksum.h"

#include <openssl/evp.h>

#include "error.h"

namespace pq::runner {

std::string sha256(const void* data, size_t size) {
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned int length = 0;
    if (EVP_Digest(data, size, digest, &length, EVP_sha256(), nullptr) != 1)
        throw Error("SHA-256 cannot be computed", "libcrypto", "Install OpenSSL again.");
    std::string text;
    for (unsigned int i = 0; i < length; ++i)
        for (const int nibble : {digest[i] >> 4, digest[i] & 15}) text += "0123456789abcdef"[nibble];
    return text;
}

}  // namespace pq::runner
