#!/usr/bin/env python3
"""Executes notebooks in this process: nothing waits for a kernel, and what is imported stays imported.

Run as a script, it imports what the runs need, then forks for every notebook that `scripts/notebook.py` asks for on the socket that is
its standard input, until its parent ends: 58 runs import torch and read the corpus' records once."""
import gc
import json
import os
import signal
import socket
import sys
import threading
import traceback
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"       # figures are outputs, as in a kernel

import papermill
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from nbformat.v4 import new_output
from papermill.engines import Engine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from traitlets import Type
from traitlets.config import Config


class Said:
    "A stream that goes on to where it went, and into the outputs of the cell."
    def __init__(self, name:str, stream, outputs:list): self.name, self.stream, self.outputs = name, stream, outputs
    def __getattr__(self, name): return getattr(self.stream, name)

    def write(self, text:str) -> int:
        last = self.outputs[-1] if self.outputs else {}
        if last.get("name") == self.name: last["text"] += text
        elif text: self.outputs.append(new_output("stream", name=self.name, text=text))
        return self.stream.write(text)


class Results(DisplayHook):
    "The value of a cell's last line."
    def start_displayhook(self): pass
    def write_output_prompt(self): pass
    def finish_displayhook(self): pass
    def write_format_data(self, format_dict, md_dict=None):
        self.shell.outputs.append(new_output("execute_result", format_dict, metadata=md_dict or {}, execution_count=self.prompt_count))


class Displays(DisplayPublisher):
    "Figures and whatever else a cell displays."
    def publish(self, data, metadata=None, **_): self.shell.outputs.append(new_output("display_data", data, metadata=metadata or {}))
    def clear_output(self, wait=False): self.shell.outputs.clear()


class Shell(InteractiveShell):
    "IPython whose outputs are those of a notebook's cell."
    displayhook_class, display_pub_class, outputs = Type(Results), Type(Displays), []
    def enable_gui(self, gui=None): pass
    def _showtraceback(self, etype, evalue, stb):
        self.outputs.append(new_output("error", ename=etype.__name__, evalue=str(evalue), traceback=list(stb)))
        print("\n".join(stb), file=sys.__stderr__, flush=True)


def shell() -> Shell: return Shell.instance(config=Config({"HistoryManager": {"enabled": False}}))


class Here(Engine):
    "For papermill: cell after cell, to the first error, which papermill then raises."
    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **_):
        here = shell()
        for i, cell in enumerate(nb_man.nb.cells):
            nb_man.cell_start(cell, i)
            if cell.cell_type == "code" and not cls.run(here, cell): nb_man.cell_exception(cell, i)
            nb_man.cell_complete(cell, i)
            if cell.metadata.papermill["exception"]: return

    @staticmethod
    def run(here, cell) -> bool:
        here.outputs, cell.execution_count = cell.outputs, here.execution_count
        with redirect_stdout(Said("stdout", sys.stdout, cell.outputs)), redirect_stderr(Said("stderr", sys.stderr, cell.outputs)):
            return here.run_cell(cell.source, store_history=True).success


def execute(notebook:str, *given:str) -> int:
    "Run `notebook` with given parameters (`-p`, name, value, ...), its copy with outputs to artifacts/executed; 0, or 1 after an error that was shown."
    names, values = given[1::3], given[2::3]
    out = Path("artifacts/executed", "-".join([Path(notebook).stem, *values[-1:]]) + ".ipynb")
    out.parent.mkdir(parents=True, exist_ok=True)
    papermill_engines.register("here", Here)
    try: papermill.execute_notebook(notebook, str(out), dict(zip(names, values)), engine_name="here", kernel_name="python3", progress_bar=False)
    except PapermillExecutionError: return 1
    finally:
        for stream in (sys.stdout, sys.stderr): stream.flush()
    return 0


def answer(client:socket.socket) -> int:
    "In a fork: the notebook that the client wants, in its folder, on its terminal; ends with it."
    asked, terminal, *_ = socket.recv_fds(client, 2**16, 3)
    for i, fd in enumerate(terminal): os.dup2(fd, i)
    os.setpgid(0, 0)
    def end_with_client(): client.recv(1) or os.killpg(0, signal.SIGKILL)
    threading.Thread(target=end_with_client, daemon=True).start()
    folder, argv, ours = json.loads(asked)
    os.environ.update(ours)
    os.chdir(folder)
    code = execute(*argv)
    client.send(bytes([code]))
    return code


def forked(client:socket.socket):
    "The life of a fork."
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)      # it waits for its own
    code = 1
    try: code = answer(client)
    except BaseException: traceback.print_exc()
    finally: os._exit(code)                            # whatever happens, no second server


def share():
    "What no fork has to do again: imports, reading what is known of the clips; and whatever lives by now is no business of their collectors."
    shell()                                            # before matplotlib, which looks whether there is one
    import matplotlib.pyplot, pandas                   # noqa: E401, F401
    from mmqlora.config import load_params
    from mmqlora.core import InputError
    from mmqlora.runs import split_records
    with suppress(InputError, KeyError): split_records(load_params(), "train")         # no corpus, no such split: the run says so
    gc.collect()
    gc.freeze()


def serve(listener:socket.socket):
    parent = os.getppid()
    share()
    listener.settimeout(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while os.getppid() == parent:
        try: client, _ = listener.accept()
        except TimeoutError: continue
        if os.fork() == 0: forked(client)
        client.close()


if __name__ == "__main__": serve(socket.socket(fileno=os.dup(0)))
