// Facts about the device and its errors, without torch.
#pragma once

extern "C" const char* parrot_cuda_error_string(int error);
