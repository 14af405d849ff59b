"""Check a submission's source before it runs: it may only use what a router needs.

The file is parsed, never imported. The first violation is reported in one sentence with its line.
The rules are narrow on purpose: a router needs torch, arithmetic and the names of routers.py and
moe.py. This keeps out mistakes and simple cheating, not a determined attacker, who can hide any
name from a check of the source. course/contain.py therefore also watches the code as it runs.
"""

import ast
import importlib
import importlib.util
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from torch import nn

from config import UserError

ROUTER_NAMES = {
    "Router", "Routing", "TopKRouter", "RandomRouter", "pool", "top_k_gates",
    "load_balancing_loss", "router_z_loss",
}  # fmt: skip
# module -> the names that may be used of it; None: all but modules, private names and TORCH
ALLOWED: dict[str, set[str] | None] = {
    "__future__": {"annotations"}, "math": None, "itertools": None,
    "collections": {"Counter", "OrderedDict", "defaultdict", "deque"},
    "collections.abc": {"Callable", "Iterable", "Iterator", "Mapping", "Sequence"},
    "functools": {"cache", "cached_property", "lru_cache", "partial", "reduce"},
    "typing": {"Any", "Callable", "ClassVar", "Final", "Literal", "Optional", "Union", "cast"},
    "torch": None, "torch.nn": None, "torch.nn.functional": None, "torch.nn.init": None,
    "torch.fft": None, "torch.linalg": None, "torch.special": None, "torch.distributions": None,
    "torch.autograd": {"Function", "grad"},
    "routers": ROUTER_NAMES, "moe": {"MLP", "GatedMLP"},
}  # fmt: skip
TORCH = {  # of torch: files, compiled code, processes and global settings
    "save", "load", "from_file", "compile", "manual_seed", "seed", "default_generator", "fork",
    "use_deterministic_algorithms", "prepare_multiprocessing_environment",
}  # fmt: skip
TORCH_CLASSES = {"Tensor", "FloatTensor", "LongTensor", "BoolTensor", "Size", "Generator"}
BUILTINS = {  # access to files, to other code, or to names that the source does not show
    "open", "exec", "eval", "compile", "input", "breakpoint", "help", "globals", "locals", "vars",
    "getattr", "setattr", "delattr", "memoryview", "os", "sys", "type",
}  # fmt: skip
FRAMES = {  # lead from an error, a generator or a tensor to the variables of others, or to modules
    "f_back", "f_globals", "f_locals", "f_builtins", "f_code", "tb_frame", "tb_next", "gi_frame",
    "gi_yieldfrom", "gi_code", "cr_frame", "cr_await", "ag_frame", "ag_await", "obj", "grad_fn",
}  # fmt: skip
WRITERS = {"tofile", "dump", "save", "from_file", "storage", "untyped_storage", "ctypes"}
DUNDERS = {"__init__", "__name__", "__repr__", "__len__", "__all__", "__doc__"}
MODULE = set(dir(nn.Module())) - {"extra_repr"}  # what training, saving and hooks rely on
DECLARED = {"needs", "level", "frozen", "sums_to_one", "causal", "batch_invariant", "at_most_k",
            "may_drop", "gate", "penalty", "update"}  # fmt: skip


class Vetting(ast.NodeVisitor):
    """Collects (line, sentence) of every violation."""

    def __init__(self, tree: ast.Module):
        self.found: list[tuple[int, str]] = []
        self.imported: dict[str, str] = {}  # name in the file -> full name of what it is
        classes = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
        self.routers = {c.name for c in router_classes(tree)}  # and what they inherit from
        for _ in classes:
            bases = {root_of(b) for n in self.routers & classes.keys() for b in classes[n].bases}
            self.routers |= bases & classes.keys()
        self.visit(tree)

    def refuse(self, node: ast.AST, sentence: str) -> None:
        self.found.append((getattr(node, "lineno", 1), sentence))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.check_import(node, alias.name)
            top = alias.name.split(".")[0]
            self.imported[alias.asname or top] = alias.name if alias.asname else top

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = "." * node.level + (node.module or "")
        if not self.check_import(node, module):
            return
        for alias in node.names:
            full = f"{module}.{alias.name}"
            if full not in ALLOWED:
                self.check_member(node, module, alias.name)
            self.imported[alias.asname or alias.name] = full

    def check_import(self, node: ast.AST, module: str) -> bool:
        if module not in ALLOWED:
            names = ", ".join(sorted(ALLOWED))
            self.refuse(node, f"imports {module}; a router may import only {names}")
        return module in ALLOWED

    def visit_Name(self, node: ast.Name) -> None:
        self.check_name(node, node.id)
        if node.id in BUILTINS:
            self.refuse(node, f"uses {node.id}, which a router does not need")
        elif self.imported.get(node.id) in ALLOWED and isinstance(node.ctx, ast.Load):
            self.refuse_module(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.check_name(node, node.attr)
        root, is_read = root_of(node), isinstance(node.ctx, ast.Load)
        if not is_read and root in self.imported:
            self.refuse(node, f"changes {ast.unparse(node)}, which is not part of the router")
        elif not is_read and (node.attr in DECLARED or node.attr in MODULE):
            self.refuse(node, f"changes {node.attr}, which is Router's own")
        elif not is_read and (root not in ("self", "ctx") or not isinstance(node.value, ast.Name)):
            self.refuse(node, f"changes {ast.unparse(node)}: set attributes of self only")
        module = self.full_name(node.value)
        if f"{module}.{node.attr}" in ALLOWED:
            self.refuse_module(node)
        elif module in ALLOWED:
            self.check_member(node, module, node.attr)
        else:
            self.visit(node.value)

    def refuse_module(self, node: ast.expr) -> None:
        """A module in another variable would not be recognised there."""
        name = ast.unparse(node)
        self.refuse(node, f"uses the module {name} as a value; name what you need of it")

    def full_name(self, node: ast.expr) -> str:
        """F.softmax -> "torch.nn.functional.softmax"; "" for what is not imported."""
        if isinstance(node, ast.Name):
            return self.imported.get(node.id, "")
        base = self.full_name(node.value) if isinstance(node, ast.Attribute) else ""
        return base and f"{base}.{node.attr}"

    def check_member(self, node: ast.AST, module: str, name: str) -> None:
        """A name of an imported module."""
        allowed = ALLOWED[module]
        if allowed is not None:
            if name not in allowed:
                names = ", ".join(sorted(allowed))
                self.refuse(node, f"uses {module}.{name}; allowed are {names}")
        elif name.startswith("_") or name == "*" or is_module(module, name):
            self.refuse(node, f"uses {module}.{name}, which a router does not need")
        elif module == "torch":
            is_class = name[:1].isupper() and name not in TORCH_CLASSES
            if is_class or name in TORCH or name.startswith(("set_", "import_")):
                self.refuse(node, f"uses torch.{name}, which has effects outside the router")

    def check_name(self, node: ast.AST, name: str) -> None:
        """The name of a variable, or of an attribute of any object."""
        is_dunder = name.startswith("__") and name.endswith("__")
        if is_dunder and name not in DUNDERS:
            self.refuse(node, f"uses {name}, which a router does not need")
        elif isinstance(node, ast.Name):
            return
        elif name in FRAMES:
            self.refuse(node, f"uses {name}, which a router does not need")
        elif name == "modality":
            self.refuse(node, "reads the true modality, which a graded router must not use")
        elif name == "needs":
            self.refuse(node, "uses needs, which is declared once, as a tuple of names")
        elif name in WRITERS:
            self.refuse(node, f"uses {name}; a router writes no files")
        elif name == "compile":
            self.refuse(node, "uses compile, which replaces how the router is called")
        elif name in ("format", "format_map"):
            self.refuse(node, f"uses {name}, which can read any attribute; write an f-string")
        elif name.startswith("register_") and name not in ("register_buffer", "register_parameter"):
            self.refuse(node, f"uses {name}; hooks are not allowed")
        elif name.startswith("_") and not is_dunder and name in MODULE:
            self.refuse(node, f"uses {name}, which is nn.Module's own")

    def visit_Match(self, node: ast.Match) -> None:
        """A class in a pattern reads attributes that the source need not name."""
        self.refuse(node, "uses match; write if")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if node.keywords:
            self.refuse(node, f"gives class {node.name} a metaclass or another keyword")
        tuples = {target: part.value.elts for part in node.body for target in targets_of(part)
                  if isinstance(part.value, ast.Tuple)}  # fmt: skip
        for name, at in bound_in(node):
            is_dunder = name.startswith("__") and name.endswith("__")
            if isinstance(at, ast.FunctionDef) and is_dunder and name not in DUNDERS:
                self.refuse(at, f"defines {name}, which a router does not need")
            elif node.name in self.routers and name in MODULE and not is_dunder:
                self.refuse(at, f"replaces Router.{name}; override `gate` instead")
            elif name == "needs":
                words = [e.value for e in tuples.get(at, [at]) if isinstance(e, ast.Constant)]
                if "modality" in words:
                    self.refuse(at, "needs the true modality, which a graded router must not use")
                elif len(words) != len(tuples.get(at, [at])):
                    self.refuse(at, "declares needs as something other than a tuple of names")
        self.generic_visit(node)


def targets_of(statement: ast.stmt) -> list[ast.expr]:
    if isinstance(statement, ast.Assign):
        return statement.targets
    return [statement.target] if isinstance(statement, ast.AnnAssign) else []


def bound_in(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(name, node) of what is defined or assigned in a class's body, not inside its functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child.name, child
            continue
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id, child
        elif isinstance(child, ast.alias):
            yield child.asname or child.name, child
        elif isinstance(child, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and child.name:
            yield child.name, child
        yield from bound_in(child)


def is_module(module: str, name: str) -> bool:
    """Whether it is a module: one that the other imports, or a part of it, loaded or not."""
    loaded = importlib.import_module(module)
    if isinstance(vars(loaded).get(name), ModuleType):  # torch.ops is one without a file
        return True
    return hasattr(loaded, "__path__") and bool(importlib.util.find_spec(f"{module}.{name}"))


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
