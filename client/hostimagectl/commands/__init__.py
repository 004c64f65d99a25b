"""The commands of hostimagectl, a module each.

A command is ``async def run(arguments, console) -> int``: it prints its result and gives the exit code, or
raises ``Failure``. Its module is imported when it is called, so that ``--help`` stays fast.
"""
