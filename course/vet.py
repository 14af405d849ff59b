"""Check a submission's source before it runs: it may only use what a router needs.

The file is parsed, never imported. The first violation is reported in one sentence with its line.
The rules are narrow on purpose: a router needs torch, arithmetic and the names of routers.py and
moe.py. This keeps out mistakes and simple cheating, not a determined attacker, who can hide any
name from a check of the source. course/contain.py therefore also watches the code as it runs.
"""

import ast
import io
import tokenize
from pathlib import Path

from config import UserError

ROUTER_NAMES = {
    "Router", "Routing", "TopKRouter", "RandomRouter", "pool", "top_k_gates",
    "load_balancing_loss", "router_z_loss",
}  # fmt: skip
# module -> the names that may be imported from it; None: all that are not forbidden below
ALLOWED: dict[str, set[str] | None] = {
    "__future__": None, "collections": None, "dataclasses": None, "functools": None,
    "itertools": None, "math": None, "torch": None, "typing": None,
    "routers": ROUTER_NAMES, "moe": {"MLP", "GatedMLP"},
}  # fmt: skip
BUILTINS = {  # access to files, to other code, or to names that the source does not show
    "open", "exec", "eval", "compile", "input", "breakpoint", "globals", "locals", "vars",
    "getattr", "setattr", "delattr", "memoryview", "os", "sys",
}  # fmt: skip
MODULES = {  # found as attributes of other modules
    "os", "sys", "builtins", "importlib", "subprocess", "ctypes", "inspect", "gc", "pickle",
    "socket", "threading", "multiprocessing", "warnings", "types", "abc", "keyword", "contextlib",
}  # fmt: skip
FRAMES = {"f_back", "f_globals", "f_locals", "f_builtins", "gi_frame", "tb_frame", "cr_frame"}
TORCH = {  # of torch: files, compiled code, other processes and global settings
    "save", "load", "hub", "jit", "ops", "classes", "library", "package", "serialization",
    "storage", "from_file", "distributed", "cpp_extension", "cpp_builder", "export", "onnx",
    "compile", "compiler", "overrides", "manual_seed", "seed", "fx", "multiprocessing",
    "random", "default_generator",
}  # fmt: skip
DUNDERS = {"__init__", "__name__", "__repr__", "__len__", "__post_init__", "__all__", "__doc__"}
BASE_METHODS = {"forward", "_call_impl"}  # they get every hint, so they must not be replaced


class Vetting(ast.NodeVisitor):
    """Collects (line, sentence) of every violation."""

    def __init__(self, tree: ast.Module):
        self.found: list[tuple[int, str]] = []
        self.modules: dict[str, str] = {}  # name in the file -> the module it is from
        self.routers = {c.name for c in router_classes(tree)}
        self.visit(tree)

    def refuse(self, node: ast.AST, sentence: str) -> None:
        self.found.append((getattr(node, "lineno", 1), sentence))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.imported(node, alias.name, alias.asname or alias.name.split(".")[0])

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or "."
        for alias in node.names:
            allowed = ALLOWED.get(module)
            if allowed is not None and alias.name not in allowed:
                names = ", ".join(sorted(allowed))
                self.refuse(node, f"imports {alias.name} from {module}; allowed are {names}")
                continue
            self.imported(node, f"{module}.{alias.name}", alias.asname or alias.name)

    def imported(self, node: ast.AST, name: str, known_as: str) -> None:
        top, *parts = name.split(".")
        if top not in ALLOWED:
            self.refuse(
                node, f"imports {name}; a router may import only {', '.join(sorted(ALLOWED))}"
            )
        for part in parts:
            self.check_name(node, part, root=top)
        self.modules[known_as] = top

    def visit_Name(self, node: ast.Name) -> None:
        self.check_name(node, node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        root = root_of(node)
        module = self.modules.get(root or "", "")
        if module in ("routers", "moe") and not isinstance(node.value, ast.Name):
            module = ""  # an attribute of a class or function of the module
        self.check_name(node, node.attr, module)
        if node.attr == "modality":
            self.refuse(node, "reads the true modality, which a graded router must not use")
        if isinstance(node.ctx, ast.Store | ast.Del) and root in self.modules:
            self.refuse(node, f"changes {ast.unparse(node)}, which is not part of the router")
        self.generic_visit(node)

    def check_name(self, node: ast.AST, name: str, root: str | None = None) -> None:
        """root: the module with this attribute; "" for another object; None for a plain name."""
        is_dunder = name.startswith("__") and name.endswith("__")
        is_hidden = (is_dunder and name not in DUNDERS) or name in FRAMES
        if is_hidden or (root is None and name in BUILTINS):
            self.refuse(node, f"uses {name}, which a router does not need")
        elif root == "torch" and (name in TORCH or name.startswith("set_")):
            self.refuse(node, f"uses torch's {name}, which has effects outside the router")
        elif root in ("routers", "moe") and name not in (ALLOWED[root] or ()):
            self.refuse(node, f"uses {root}.{name}; allowed are {', '.join(sorted(ALLOWED[root]))}")
        elif root and not is_dunder and (name in MODULES or name.startswith("_")):
            self.refuse(node, f"uses {root}'s {name}, which a router does not need")
        elif name.startswith("register_") and name not in ("register_buffer", "register_parameter"):
            self.refuse(node, f"uses {name}; hooks are not allowed")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for part in node.body:
            if isinstance(part, ast.FunctionDef | ast.Assign | ast.AnnAssign):
                self.member(node, part)
        self.generic_visit(node)

    def member(self, owner: ast.ClassDef, node: ast.stmt) -> None:
        if isinstance(node, ast.FunctionDef):
            names = [node.name]
            if node.name.startswith("__") and node.name not in DUNDERS:
                self.refuse(node, f"defines {node.name}, which a router does not need")
        else:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [t.id for t in targets if isinstance(t, ast.Name)]
        if owner.name in self.routers and (hidden := BASE_METHODS & set(names)):
            name = hidden.pop()
            self.refuse(node, f"replaces Router.{name}; override `gate` instead")
        if "needs" in names and isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            constants = {c.value for c in ast.walk(node.value) if isinstance(c, ast.Constant)}
            if "modality" in constants:
                self.refuse(node, "needs the true modality, which a graded router must not use")


def root_of(node: ast.expr) -> str | None:
    """a.b.c -> "a"; None if the expression does not begin with a name."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def router_classes(tree: ast.Module) -> list[ast.ClassDef]:
    """The classes of the file that inherit, directly or not, from a class of routers.py."""
    known, found = {"Router", "TopKRouter", "RandomRouter", "ModalityRouter", "OracleRouter"}, []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "routers":
            known |= {a.asname for a in node.names if a.asname and a.name in known}
        if isinstance(node, ast.ClassDef):
            bases = {b.attr if isinstance(b, ast.Attribute) else root_of(b) for b in node.bases}
            if bases & known:
                known.add(node.name)
                found.append(node)
    return found


def parse_source(text: str, where: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None) or 1
        raise UserError(f"{where}, line {line}: not Python: {error.args[0]}") from error


def vet(text: str, where: str) -> None:
    """Raise UserError for the first violation."""
    try:
        found = Vetting(parse_source(text, where)).found
    except RecursionError as error:
        raise UserError(f"{where}, line 1: is nested too deeply to be parsed") from error
    if found:
        line, sentence = min(found)
        raise UserError(f"{where}, line {line}: {sentence}")


def read_submission(spec: str) -> tuple[Path, str, str]:
    """FILE.py:Class -> the file, its text, the class. Raises UserError."""
    name, _, cls = spec.rpartition(":")
    path = Path(name)
    if not name.endswith(".py") or not path.is_file() or not cls.isidentifier():
        raise UserError(f"--router {spec}: not FILE.py:Class")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line 1: not UTF-8 text") from error
    tree = parse_source(text, path.name)
    names = [c.name for c in router_classes(tree)]
    if cls not in names:
        there = f"it has {', '.join(names)}" if names else "it has none"
        raise UserError(f"{path.name}, line 1: no subclass of Router is named {cls}; {there}")
    return path, text, cls


def only_router(text: str, where: str) -> str:
    """The name of the file's router: its one subclass of Router without subclasses of its own."""
    classes = router_classes(parse_source(text, where))
    parents = {root_of(base) for c in classes for base in c.bases}
    leaves = [c.name for c in classes if c.name not in parents]
    if len(leaves) != 1:
        found = ", ".join(leaves) or "none"
        raise UserError(f"{where}, line 1: must have one subclass of Router, has {found}")
    return leaves[0]


def count_lines(text: str) -> int:
    """Lines of code: not blank, not comment, not docstring."""
    kept: set[int] = set()
    no_code = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
               tokenize.ENDMARKER)  # fmt: skip
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in no_code:
            kept |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        can_have = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if can_have and ast.get_docstring(node, clean=False) is not None:
            kept -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(kept)
