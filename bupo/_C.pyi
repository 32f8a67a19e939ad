def build_info() -> dict[str, object]: ...
def set_workspace_bytes(bytes: int) -> None: ...
def set_portable_only(only: bool) -> None: ...
def cuda_path(
    capability: int,
    bfloat16: bool,
    aligned: bool,
    width: int,
    vocab: int,
    softcap: bool,
    entropy_gradient: bool,
) -> str: ...
def cuda_plan(
    tokens: int,
    width: int,
    vocab: int,
    element: int,
    gradients: bool,
    weight_gradient: bool,
    half: bool,
    budget: int,
    sm90: bool,
    placed: bool,
) -> dict[str, int]: ...
