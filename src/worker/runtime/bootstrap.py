# Runs in every warm Python interpreter of the worker, before the code of a function; see python.rs.
#
# The interpreter was started as `python3 main.py`, and imports this file as `sitecustomize`, just before it
# opens main.py. So there are two ways on from here. In script mode this import fails as if there were no
# such module, and the interpreter runs main.py by itself. Nothing of this file is left then, neither in
# tracebacks nor in sys.modules. In handler mode this import never ends: it serves events until the worker
# closes the control socket. For the frames see control.rs.
import sys

# Of those below, only json takes time. Nearly every function needs it, and so do the frames.
PLAIN_MODULES = frozenset(sys.modules)
import gc
import json
import os
import time

CONTROL = 3
# Where the interpreter found this file: a zip that is its standard input.
ARCHIVE = "/proc/self/fd/0"
# Longest frame, without its length. The same number as in control.rs.
FRAME_BYTES_MAX = 16 << 20
# Longest text of an error, because a message may contain any data. Of a longer one, both ends are kept.
ERROR_CHARS_MAX = 256 * 1024
# Descriptors above the usual ones are rarely closed by mistake.
DESCRIPTOR_MAX = 1023


class Control:
    """The control socket."""

    def __init__(self):
        # Out of the way of code that closes or reuses low descriptors. Programs that it starts do not get it.
        self.descriptor = min(os.sysconf("SC_OPEN_MAX") - 1, DESCRIPTOR_MAX)
        os.dup2(CONTROL, self.descriptor, inheritable=False)
        os.close(CONTROL)
        self.rest = b""

    def close(self):
        os.close(self.descriptor)

    def receive(self):
        """Returns the next frame, or None after the last one."""
        data = self.rest or os.read(self.descriptor, 65536)
        while len(data) < 4:
            more = os.read(self.descriptor, 65536)
            if not more:
                return None
            data += more
        end = 4 + int.from_bytes(data[:4], "big")
        if len(data) < end:
            data = bytearray(data)
            while len(data) < end:
                more = os.read(self.descriptor, min(end - len(data), 1 << 20))
                if not more:
                    return None
                data += more
        self.rest = bytes(data[end:])
        return json.loads(data[4:end])

    def send(self, body):
        left = memoryview(len(body).to_bytes(4, "big") + body)
        while left:
            left = left[os.write(self.descriptor, left):]


def error_frame(kind, text, times=""):
    if len(text) > ERROR_CHARS_MAX:
        text = f"{text[:ERROR_CHARS_MAX // 2]} […] {text[-ERROR_CHARS_MAX // 2:]}"
    # A lone surrogate cannot be sent.
    text = text.encode("utf-8", "backslashreplace").decode()
    return f'{{"is":"{kind}","error":{json.dumps(text)}{times}}}'.encode()


def leave_no_trace():
    """Undoes what brought this file here, so that the process looks as if it had none."""
    sys.path[:] = [path for path in sys.path if path != ARCHIVE]
    sys.path_importer_cache.pop(ARCHIVE, None)
    sys.modules["zipimport"]._zip_directory_cache.pop(ARCHIVE, None)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def set_environment(env):
    # Where LC_ALL and LANG are not set, the interpreter has set this for its child processes (PEP 538).
    coerced = os.environ.get("LC_CTYPE")
    os.environ.clear()
    os.environ.update(env)
    if coerced is not None:
        os.environ.setdefault("LC_CTYPE", coerced)
    if "TZ" in env:
        time.tzset()


def forget_shadowed_modules(directory):
    """Forgets the modules that this file has imported, if the function has one of the same name."""
    ours = sys.modules.keys() - PLAIN_MODULES
    names = {name.partition(".")[0] for name in os.listdir(directory)}
    if not names.isdisjoint(name.partition(".")[0] for name in ours):
        for name in ours:
            del sys.modules[name]


def find_real_sitecustomize():
    """Returns the spec of the module for which this file stands in, or None."""
    del sys.modules["sitecustomize"]
    spec = sys.modules["_frozen_importlib_external"].PathFinder.find_spec("sitecustomize")
    # The import of this file fails without it.
    sys.modules["sitecustomize"] = None
    return spec if spec is not None and spec.loader is not None else None


def run_real_sitecustomize(spec):
    if spec is None:
        # The import ends like that of a missing module.
        raise ImportError("No module named 'sitecustomize'", name="sitecustomize")
    module = sys.modules["_frozen_importlib"].module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


class Context(dict):
    """What a handler gets beside its event: a dictionary whose members are also attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the context has no {name!r}, only {', '.join(self)}") from None

    def remaining_time_ms(self):
        """Returns the time until the run is stopped, in milliseconds."""
        return max(0, self["deadline_ms"] - int(time.time() * 1000))

    # The names of AWS Lambda, so that its handlers run unchanged.
    get_remaining_time_in_millis = remaining_time_ms
    aws_request_id = property(lambda self: self["request_id"])
    function_name = property(lambda self: self["function_id"])
    memory_limit_in_mb = property(lambda self: self["memory_mb"])


def context_of(members):
    return Context(
        request_id=members["requestId"],
        function_id=members["functionId"],
        deadline_ms=members["deadlineMs"],
        memory_mb=members["memoryMb"],
        model_id=members["modelId"],
        output_dir=members["outputDir"],
    )


class Flusher:
    """Writes out what is buffered, so that the worker finds all output of an event in the pipes."""

    def __init__(self, directory):
        self.directory = directory
        # Without it, neither Python nor C buffers.
        self.has_c_buffers = not os.environ.get("PYTHONUNBUFFERED")
        self.modules = 0
        self.flush_c = None

    def flush(self):
        for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
            try:
                stream.flush()
            except Exception:
                pass  # The function has closed or replaced it.
        if self.has_c_buffers:
            self.flush_extensions()

    def flush_extensions(self):
        """Flushes C, once an extension module of the function is there. Loading ctypes takes milliseconds."""
        if self.flush_c is None and len(sys.modules) != self.modules:
            self.modules = len(sys.modules)
            files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
            if any(file.endswith(".so") and file.startswith(self.directory) for file in files):
                import ctypes

                self.flush_c = ctypes.CDLL(None).fflush
        if self.flush_c is not None:
            self.flush_c(None)


def described(error):
    """Returns the traceback of an error, from the first frame that belongs to the function."""
    import traceback

    frames = error.__traceback__
    while frames is not None:
        code = frames.tb_frame.f_code
        module = frames.tb_frame.f_globals.get("__name__", "")
        is_ours = code.co_filename == "<bootstrap>" or code.co_filename.startswith("<frozen importlib")
        if not is_ours and module.partition(".")[0] not in ("asyncio", "importlib"):
            break
        frames = frames.tb_next
    try:
        error.__traceback__ = frames
        return "".join(traceback.format_exception(type(error), error, frames))
    except Exception:
        return f"{type(error).__name__}, whose traceback cannot be shown\n"


class HandlerError(Exception):
    """The handler cannot be used. Its text is for the owner of the function."""


def find_handler(name):
    module_name, _, function_name = name.rpartition(".")
    import importlib

    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Not a module that is missing inside of it.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        path = module_name.replace(".", "/")
        raise HandlerError(
            f"the handler is {name}, but the code has neither {path}.py nor {path}/__init__.py"
        ) from None
    function = getattr(module, function_name, None)
    if callable(function):
        return function
    # The names that the module defines itself, without what it has imported.
    names = [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module_name
    ]
    problem = "is not a function" if hasattr(module, function_name) else "does not exist"
    raise HandlerError(
        f"the handler is {name}, but {function_name} {problem} in {module_name}; "
        f"its functions are: {', '.join(names) or 'none'}"
    )


def finish(code):
    """Ends the process as the interpreter would. The regular way out is not open during an import."""
    import atexit

    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code)


class HandlerServer:
    """Calls the handler for one event after the other."""

    def __init__(self, control, directory):
        self.control = control
        self.flusher = Flusher(directory)
        self.loop = None
        self.is_child = False
        self.encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
        self.encode_ascii = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode

    def after_fork(self):
        # A child process of the function must not answer.
        self.is_child = True
        try:
            self.control.close()
        except OSError:
            pass

    def load(self, name):
        began = time.perf_counter()
        try:
            handler = find_handler(name)
        except HandlerError as error:
            self.fail(str(error))
        except BaseException as error:
            self.fail(described(error))
        if self.is_child:
            finish(0)
        # What the module has printed belongs to the output of the load.
        self.flusher.flush()
        self.control.send(b'{"is":"loaded","ms":%.3f}' % ((time.perf_counter() - began) * 1000))
        return handler

    def fail(self, text):
        self.flusher.flush()
        if not self.is_child:
            self.control.send(error_frame("failed", text))
        finish(1)

    def complete(self, awaitable):
        """Runs what an async handler has returned, on a loop that stays for the next events."""
        import asyncio

        if self.loop is None or self.loop.is_closed():
            self.loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self.loop)
        return self.loop.run_until_complete(awaitable)

    def value_frame(self, value, times):
        try:
            try:
                body = self.encode(value).encode()
            except UnicodeEncodeError:
                # Lone surrogates are valid in JSON only as escapes.
                body = self.encode_ascii(value).encode()
        except BaseException as error:
            # Also what members of the value raise.
            return self.unwritable(str(error), times)
        if len(body) > FRAME_BYTES_MAX - 1024:
            return self.unwritable(f"it has {len(body)} bytes, more than {FRAME_BYTES_MAX - 1024}", times)
        return b'{"is":"value","value":%b%b}' % (body, times.encode())

    def unwritable(self, why, times):
        text = f"the handler returned a value that cannot be written as JSON: {why}"
        return error_frame("error", text, times)

    def serve(self, handler):
        environ = os.environ
        while (frame := self.control.receive()) is not None:
            for name, value in frame["env"].items():
                environ[name] = value
            value = error = None
            context = context_of(frame["context"])
            began = time.perf_counter()
            try:
                value = handler(frame["event"], context)
                if hasattr(type(value), "__await__"):
                    value = self.complete(value)
            except BaseException as caught:
                error = caught
            times = f',"ms":{(time.perf_counter() - began) * 1000:.3f}'
            if self.is_child:
                # A fork that has left the handler.
                if error is not None:
                    sys.stderr.write(described(error))
                finish(0 if error is None else 1)
            if error is None:
                answer = self.value_frame(value, times)
            else:
                answer = error_frame("error", described(error), times)
            # Objects of the event may print when they are deleted.
            del value, error, context, frame
            self.flusher.flush()
            self.control.send(answer)


def serve_handler(control, directory, name, real):
    try:
        run_real_sitecustomize(real)
    except Exception:
        sys.modules.pop("sitecustomize", None)
    # `site` is still being imported. Threads of the function that import it would wait for the end.
    sys.modules["site"].__spec__._initializing = False
    sys.path.insert(0, directory)
    server = HandlerServer(control, directory)
    os.register_at_fork(after_in_child=server.after_fork)
    server.serve(server.load(name))
    finish(0)


def main():
    try:
        control = Control()
        leave_no_trace()
        real = find_real_sitecustomize()
        # What exists by now lives as long as the process. Without a scan of it, the exit takes half the time.
        gc.freeze()
        frame = control.receive()
        if frame is None:
            # The worker does not need this interpreter any more.
            os._exit(0)
        set_environment(frame["env"])
        directory = os.getcwd()
        forget_shadowed_modules(directory)
        if frame["do"] == "script":
            control.send(b'{"is":"taken"}')
        if frame["do"] == "load":
            serve_handler(control, directory, frame["handler"], real)
        control.close()
    except BaseException as error:
        # An error of this import must not lead to a run of main.py.
        why = "the worker cannot reach this process any more; has it closed all descriptors?"
        sys.stderr.write(f"{why}\n{described(error)}")
        os._exit(70)
    run_real_sitecustomize(real)


main()
