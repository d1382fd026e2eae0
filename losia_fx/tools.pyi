from tools import (
    architectures as architectures,
    capture as capture,
    check_architecture as check_architecture,
    coverage as coverage,
    load_model as load_model,
    owners as owners,
    pretrain as pretrain,
)
