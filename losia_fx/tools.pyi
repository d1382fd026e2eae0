from tools import (
    architectures as architectures,
    check_architecture as check_architecture,
    coverage as coverage,
    pretrain as pretrain,
)
