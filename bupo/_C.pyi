def build_info() -> dict[str, object]: ...
def set_workspace_bytes(bytes: int) -> None: ...
def cuda_plan(
    tokens: int,
    width: int,
    vocab: int,
    element: int,
    gradients: bool,
    weight_gradient: bool,
    half: bool,
    budget: int,
) -> dict[str, int]: ...
