"""What a SavedModel would do, read from its file without running any of it.

A SavedModel is a program: among TensorFlow's operations are some that read and write
files, start Python or talk to other machines. Here are the operations that a model
needs to compute with, and the check that a SavedModel has no others.
"""

import os
from pathlib import Path

# The one operation list of the project: nothing here touches a file, a socket, a
# device queue or the interpreter. It is a list of what is allowed, so that an
# operation nobody thought of is refused.
ALLOWED_OPS = frozenset(
    """
    Abs Acos Acosh Add AddN AddV2 Angle Asin Asinh Atan Atan2 Atanh BesselI0 BesselI0e
    BesselI1 BesselI1e BesselJ0 BesselJ1 BesselK0 BesselK0e BesselK1 BesselK1e BesselY0
    BesselY1 Betainc Bitcast BitwiseAnd BitwiseOr BitwiseXor Cast Ceil ClipByValue
    Complex ComplexAbs Conj Cos Cosh Cross Dawsn Digamma Div DivNoNan Erf Erfc Erfinv
    Exp Expint Expm1 Floor FloorDiv FloorMod FresnelCos FresnelSin Igamma IgammaGradA
    Igammac Imag Inv Invert IsFinite IsInf IsNan LeftShift Lgamma Log Log1p Maximum
    Minimum Mod Mul MulNoNan Ndtri Neg NextAfter PopulationCount Pow Polygamma Real
    RealDiv Reciprocal RightShift Rint Round Rsqrt Sign Sin Sinh Spence Sqrt Square
    SquaredDifference Sub Tan Tanh TruncateDiv TruncateMod Xdivy Xlog1py Xlogy Zeta

    ApproximateEqual Equal Greater GreaterEqual Less LessEqual LogicalAnd LogicalNot
    LogicalOr NotEqual Select SelectV2 Where

    All Any ArgMax ArgMin Bincount Bucketize Cumprod Cumsum CumulativeLogsumexp
    DenseBincount EuclideanNorm HistogramFixedWidth InTopK InTopKV2 KthOrderStatistic
    L2Loss LowerBound Max Mean Min NthElement Prod SegmentMax SegmentMaxV2 SegmentMean
    SegmentMin SegmentMinV2 SegmentProd SegmentProdV2 SegmentSum SegmentSumV2 Sum TopK
    TopKV2 Unique UniqueV2 UniqueWithCounts UniqueWithCountsV2 UnsortedSegmentMax
    UnsortedSegmentMin UnsortedSegmentProd UnsortedSegmentSum UpperBound

    BandedTriangularSolve BatchMatMul BatchMatMulV2 BatchMatMulV3 Cholesky CholeskyGrad
    ConjugateTranspose Diag DiagPart Eig Einsum LogMatrixDeterminant Lu MatMul
    MatrixBandPart MatrixDeterminant MatrixDiag MatrixDiagPart MatrixDiagPartV2
    MatrixDiagPartV3 MatrixDiagV2 MatrixDiagV3 MatrixExponential MatrixInverse
    MatrixLogarithm MatrixSetDiag MatrixSetDiagV2 MatrixSetDiagV3 MatrixSolve
    MatrixSolveLs MatrixSquareRoot MatrixTriangularSolve Qr SelfAdjointEig
    SelfAdjointEigV2 Svd TridiagonalMatMul TridiagonalSolve

    FFT FFT2D FFT3D FFTND IFFT IFFT2D IFFT3D IFFTND IRFFT IRFFT2D IRFFT3D IRFFTND RFFT
    RFFT2D RFFT3D RFFTND

    BatchToSpace BatchToSpaceND BroadcastArgs BroadcastGradientArgs BroadcastTo Concat
    ConcatOffset ConcatV2 Const DataFormatDimMap DataFormatVecPermute DeepCopy
    DepthToSpace DynamicPartition DynamicStitch Empty EnsureShape ExpandDims
    ExtractImagePatches ExtractVolumePatches Fill Gather GatherNd GatherV2 Identity
    IdentityN InplaceAdd InplaceSub InplaceUpdate InvertPermutation LinSpace ListDiff
    MirrorPad NoOp OneHot OnesLike Pack Pad PadV2 ParallelConcat ParallelDynamicStitch
    Placeholder PlaceholderV2 PlaceholderWithDefault PreventGradient Range Rank Reshape
    Reverse ReverseSequence ReverseV2 Roll ScatterNd Shape ShapeN Size Slice Snapshot
    SpaceToBatch SpaceToBatchND SpaceToDepth Split SplitV Squeeze StopGradient
    StridedSlice TensorScatterAdd TensorScatterMax TensorScatterMin TensorScatterSub
    TensorScatterUpdate TensorStridedSliceUpdate Tile Transpose Unpack UnravelIndex
    ZerosLike

    AvgPool AvgPool3D AvgPoolGrad BatchNormWithGlobalNormalization BiasAdd BiasAddGrad
    BiasAddV1 BlockLSTM BlockLSTMV2 CTCBeamSearchDecoder CTCGreedyDecoder CTCLoss
    CTCLossV2 Conv Conv2D Conv2DBackpropFilter Conv2DBackpropInput Conv3D
    Conv3DBackpropFilterV2 Conv3DBackpropInputV2 DepthwiseConv2dNative
    DepthwiseConv2dNativeBackpropFilter DepthwiseConv2dNativeBackpropInput Dilation2D
    Elu EluGrad FakeQuantWithMinMaxArgs FakeQuantWithMinMaxVars
    FakeQuantWithMinMaxVarsPerChannel FractionalAvgPool FractionalMaxPool FusedBatchNorm
    FusedBatchNormGradV3 FusedBatchNormV2 FusedBatchNormV3 GRUBlockCell InvGrad LRN
    LSTMBlockCell LeakyRelu LeakyReluGrad LogSoftmax MaxPool MaxPool3D MaxPoolGrad
    MaxPoolGradV2 MaxPoolV2 MaxPoolWithArgmax QuantizeAndDequantizeV2
    QuantizeAndDequantizeV3 QuantizeAndDequantizeV4 ReciprocalGrad Relu Relu6 Relu6Grad
    ReluGrad RsqrtGrad Selu SeluGrad Sigmoid SigmoidGrad Softmax
    SoftmaxCrossEntropyWithLogits Softplus SoftplusGrad Softsign SoftsignGrad
    SparseSoftmaxCrossEntropyWithLogits SqrtGrad TanhGrad

    AdjustContrastv2 AdjustHue AdjustSaturation AudioSpectrogram
    CombinedNonMaxSuppression CropAndResize DecodeAndCropJpeg DecodeBmp DecodeGif
    DecodeImage DecodeJpeg DecodePng DecodeWav DrawBoundingBoxes DrawBoundingBoxesV2
    EncodeJpeg EncodePng EncodeWav ExtractGlimpse ExtractGlimpseV2 ExtractJpegShape
    HSVToRGB ImageProjectiveTransformV2 ImageProjectiveTransformV3 Mfcc
    NonMaxSuppression NonMaxSuppressionV2 NonMaxSuppressionV3 NonMaxSuppressionV4
    NonMaxSuppressionV5 NonMaxSuppressionWithOverlaps RGBToHSV ResizeArea ResizeBicubic
    ResizeBilinear ResizeNearestNeighbor ScaleAndTranslate
    StatelessSampleDistortedBoundingBox

    AsString DecodeBase64 DecodeCSV DecodeJSONExample DecodePaddedRaw DecodeRaw
    EditDistance EncodeBase64 Fingerprint ParseExample ParseExampleV2
    ParseSequenceExample ParseSequenceExampleV2 ParseSingleExample ParseTensor
    ReduceJoin RegexFullMatch RegexReplace SerializeTensor StaticRegexFullMatch
    StaticRegexReplace StringFormat StringJoin StringLength StringLower StringNGrams
    StringSplit StringSplitV2 StringStrip StringToHashBucket StringToHashBucketFast
    StringToHashBucketStrong StringToNumber StringUpper Substr UnicodeDecode
    UnicodeDecodeWithOffsets UnicodeEncode UnicodeScript UnicodeTranscode
    UnsortedSegmentJoin

    DenseCountSparseOutput DenseToDenseSetOperation DenseToSparseSetOperation
    RaggedBincount RaggedCountSparseOutput RaggedCross RaggedFillEmptyRows RaggedGather
    RaggedRange RaggedTensorFromVariant RaggedTensorToSparse RaggedTensorToTensor
    RaggedTensorToVariant SetSize SparseAdd SparseBincount SparseConcat
    SparseCountSparseOutput SparseCross SparseCrossHashed SparseCrossV2
    SparseDenseCwiseAdd SparseDenseCwiseDiv SparseDenseCwiseMul SparseFillEmptyRows
    SparseMatMul SparseReduceMax SparseReduceSum SparseReorder SparseReshape
    SparseSegmentMean SparseSegmentMeanWithNumSegments SparseSegmentSqrtN
    SparseSegmentSqrtNWithNumSegments SparseSegmentSum SparseSegmentSumWithNumSegments
    SparseSlice SparseSoftmax SparseSparseMaximum SparseSparseMinimum SparseSplit
    SparseTensorDenseAdd SparseTensorDenseMatMul SparseToDense
    SparseToSparseSetOperation

    Case ControlTrigger Enter Exit FakeParam For If LoopCond MapDefun Merge
    NextIteration PartitionedCall StatefulPartitionedCall StatelessCase StatelessIf
    StatelessWhile Switch While
    Assert CheckNumerics CheckNumericsV2
    EmptyTensorList EmptyTensorMap OptionalFromValue OptionalGetValue OptionalHasValue
    OptionalNone TensorListConcat TensorListConcatLists TensorListConcatV2
    TensorListElementShape TensorListFromTensor TensorListGather TensorListGetItem
    TensorListLength TensorListPopBack TensorListPushBack TensorListPushBackBatch
    TensorListReserve TensorListResize TensorListScatter
    TensorListScatterIntoExistingList TensorListScatterV2 TensorListSetItem
    TensorListSplit TensorListStack TensorMapErase TensorMapHasKey TensorMapInsert
    TensorMapLookup TensorMapSize TensorMapStackKeys
    TensorArrayCloseV3 TensorArrayConcatV3 TensorArrayGatherV3 TensorArrayGradV3
    TensorArrayReadV3 TensorArrayScatterV3 TensorArraySizeV3 TensorArraySplitV3
    TensorArrayV3 TensorArrayWriteV3

    AssignAddVariableOp AssignSubVariableOp AssignVariableOp DestroyResourceOp
    DisableCopyOnRead ReadVariableOp ResourceGather ResourceGatherNd ResourceScatterAdd
    ResourceScatterDiv ResourceScatterMax ResourceScatterMin ResourceScatterMul
    ResourceScatterNdAdd ResourceScatterNdSub ResourceScatterNdUpdate ResourceScatterSub
    ResourceScatterUpdate ResourceStridedSliceAssign VarHandleOp VarIsInitializedOp
    Variable VariableShape VariableV2 Assign AssignAdd AssignSub IsVariableInitialized
    AnonymousHashTable AnonymousMutableDenseHashTable AnonymousMutableHashTable
    AnonymousMutableHashTableOfTensors HashTable HashTableV2 InitializeTable
    InitializeTableV2 LookupTableExport LookupTableExportV2 LookupTableFind
    LookupTableFindV2 LookupTableImport LookupTableImportV2 LookupTableInsertV2
    LookupTableRemoveV2 LookupTableSize LookupTableSizeV2 MutableDenseHashTable
    MutableDenseHashTableV2 MutableHashTable MutableHashTableOfTensors
    MutableHashTableOfTensorsV2 MutableHashTableV2

    Multinomial NonDeterministicInts ParameterizedTruncatedNormal RandomGamma
    RandomGammaGrad RandomIndexShuffle RandomPoisson RandomPoissonV2 RandomShuffle
    RandomStandardNormal RandomUniform RandomUniformInt RngReadAndSkip RngSkip
    StatefulRandomBinomial StatefulStandardNormalV2 StatefulTruncatedNormal
    StatefulUniform StatefulUniformFullInt StatefulUniformInt StatelessMultinomial
    StatelessParameterizedTruncatedNormal StatelessRandomBinomial StatelessRandomGammaV2
    StatelessRandomGammaV3 StatelessRandomGetAlg StatelessRandomGetKeyCounter
    StatelessRandomGetKeyCounterAlg StatelessRandomNormal StatelessRandomNormalV2
    StatelessRandomPoisson StatelessRandomUniform StatelessRandomUniformFullInt
    StatelessRandomUniformFullIntV2 StatelessRandomUniformInt
    StatelessRandomUniformIntV2 StatelessRandomUniformV2 StatelessShuffle
    StatelessTruncatedNormal StatelessTruncatedNormalV2 TruncatedNormal
    """.split()
)

# Every SavedModel carries the operations that save it again and restore it. A server
# restores, so restoring may be reached there and nowhere else; saving is not reached.
CALL_OPS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
RESTORE_OPS = frozenset({"RestoreV2"})
SAVE_OPS = frozenset({"SaveV2", "MergeV2Checkpoints", "ShardedFilename", "RestoreV2"})

XLA = "_XlaMustCompile"
INTERFACE = "api_implements"


def read(path):
    """Reads `saved_model.pb` of a SavedModel's folder; nothing of it is run.

    Args:
        path: The folder.

    Returns:
        The SavedModel protocol buffer.

    Raises:
        ValueError: There is none, or it is not a SavedModel.
    """
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    file = Path(path) / "saved_model.pb"
    # Reading a pipe or a device would never end.
    for entry in Path(path).rglob("*"):
        if entry.exists() and not (entry.is_file() or entry.is_dir()):
            raise ValueError(f"Expected files and folders. Received: {str(entry)!r}")
    try:
        saved_model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise ValueError(
            f"Expected a SavedModel's folder. Received: {os.fspath(path)!r} ({error})"
        ) from None
    if not saved_model.meta_graphs:
        raise ValueError(
            f"Expected a SavedModel with a graph. Received: {os.fspath(path)!r}"
        )
    return saved_model


def serving_graph(saved_model):
    """Returns the MetaGraphDef of a SavedModel that servers load: the one tagged
    `serve`.

    Args:
        saved_model: What `read` returned.

    Returns:
        The MetaGraphDef.

    Raises:
        ValueError: There is none.
    """
    for meta_graph in saved_model.meta_graphs:
        if set(meta_graph.meta_info_def.tags) == {"serve"}:
            return meta_graph
    tags = [sorted(g.meta_info_def.tags) for g in saved_model.meta_graphs]
    raise ValueError(f"Expected a SavedModel tagged ['serve']. Received: tags {tags}")


def forbidden_ops(saved_model):
    """Finds the operations of a SavedModel that a model has no use for.

    All graphs and all functions are looked at, used or not. Operations of saving and
    restoring are part of every SavedModel; they are forbidden where a signature or an
    initializer reaches them, and restoring also where it might read another file than
    the one it is given: the model's own variables.

    Args:
        saved_model: What `read` returned.

    Returns:
        A sorted list of names, empty for a SavedModel that only computes.
    """
    forbidden = set()
    for meta_graph in saved_model.meta_graphs:
        functions = _functions(meta_graph)
        ops = {node.op for node in meta_graph.graph_def.node}
        ops |= {node.op for nodes in functions.values() for node in nodes}
        forbidden |= ops - ALLOWED_OPS - SAVE_OPS - functions.keys()
        forbidden |= SAVE_OPS & _reached_ops(meta_graph, _served(meta_graph))
        restore = [meta_graph.saver_def.restore_op_name]
        forbidden |= (SAVE_OPS - RESTORE_OPS) & _reached_ops(meta_graph, restore)
        # A function of that name would be called in place of the operation.
        forbidden |= functions.keys() & (ALLOWED_OPS | SAVE_OPS)
        if _restores_elsewhere(meta_graph):
            forbidden.add("RestoreV2")
    return sorted(forbidden)


def needs_xla(meta_graph, signature):
    """Tells whether a signature has a part that only XLA can run.

    A server that was not started with XLA refuses such a signature's requests.

    Args:
        meta_graph: What `serving_graph` returned.
        signature: The signature's name.

    Returns:
        Whether a function or an operation that it reaches must be compiled.
    """
    outputs = meta_graph.signature_def[signature].outputs.values()
    nodes, functions = _reached(meta_graph, [info.name for info in outputs])
    attributes = [node.attr for node in nodes]
    attributes += [
        f.attr
        for f in meta_graph.graph_def.library.function
        if f.signature.name in functions
    ]
    return any(XLA in a and a[XLA].b for a in attributes)


def _restores_elsewhere(meta_graph):
    """Tells whether a RestoreV2 may take its file's name from elsewhere.

    The name must come from the tensor that a server feeds it to, unchanged: through
    Identity operations and as an argument of plain function calls.
    """
    functions = {f.signature.name: f for f in meta_graph.graph_def.library.function}
    stand_ins = _stand_ins(meta_graph)
    saver = meta_graph.saver_def.filename_tensor_name
    # For each function, the arguments that are the file's name in all of its calls.
    given = {}
    waiting = [(meta_graph.graph_def.node, {_tensor(saver)})]
    while waiting:
        nodes, known = waiting.pop()
        known = _passed_on(nodes, known)
        for node in nodes:
            inputs = [_tensor(name) for name in node.input]
            if node.op == "RestoreV2" and (not inputs or inputs[0] not in known):
                return True
            called = list(_called(node.attr))
            for name in _may_run(node, stand_ins):
                arguments = set()
                if node.op in CALL_OPS and called == [name]:
                    names = _arguments(functions[name])
                    arguments = {a for a, t in zip(names, inputs) if t in known}  # noqa: B905
                before = given.get(name)
                given[name] = arguments if before is None else arguments & before
                if given[name] != before:
                    waiting.append((functions[name].node_def, given[name]))
    return False


def _passed_on(nodes, known):
    """The tensors that are those of `known`, handed on by Identity."""
    readers = {}
    for node in nodes:
        if node.op == "Identity" and node.input:
            readers.setdefault(_tensor(node.input[0]), []).append(node.name)
    known, waiting = set(known), list(known)
    while waiting:
        new = readers.pop(waiting.pop(), [])
        known.update(new)
        waiting += new
    return known


def _tensor(name):
    """One name for an operation's first output: `n`, `n:0` or `n:output:0`."""
    return name.removesuffix(":0").removesuffix(":output")


def _arguments(function):
    """The names of a function's arguments, or none where they are not clear."""
    arguments = [a.name for a in function.signature.input_arg]
    names = arguments + [node.name for node in function.node_def]
    several = any(
        a.number_attr or a.type_list_attr for a in function.signature.input_arg
    )
    return [] if several or len(set(names)) < len(names) else arguments


def _served(meta_graph):
    """The names of what a server fetches: all outputs, and what runs at the start."""
    names = [
        info.name
        for signature in meta_graph.signature_def.values()
        for info in signature.outputs.values()
    ]
    for key in ("saved_model_main_op", "legacy_init_op"):
        if key in meta_graph.collection_def:
            names += meta_graph.collection_def[key].node_list.value
    return names


def _functions(meta_graph):
    return {f.signature.name: f.node_def for f in meta_graph.graph_def.library.function}


def _stand_ins(meta_graph):
    """{function: the functions that may run when it is called}.

    TensorFlow may swap a function for another one that implements the same interface,
    when the device is the other's.
    """
    interfaces, stand_ins = {}, {}
    for function in meta_graph.graph_def.library.function:
        name = function.signature.name
        if INTERFACE in function.attr:
            interface = function.attr[INTERFACE].s
            stand_ins[name] = interfaces.setdefault(interface, set())
        stand_ins.setdefault(name, set()).add(name)
    return stand_ins


def _may_run(node, stand_ins):
    """The functions that a node calls or that may stand in for them."""
    names = (node.op, *_called(node.attr))
    return {one for name in names for one in stand_ins.get(name, ())}


def _reached_ops(meta_graph, names):
    return {node.op for node in _reached(meta_graph, names)[0]}


def _reached(meta_graph, names):
    """Follows inputs and function calls from `names`: (nodes, names of functions).

    Of a function that is called, all nodes count.
    """
    graph = {node.name: node for node in meta_graph.graph_def.node}
    functions = _functions(meta_graph)
    stand_ins = _stand_ins(meta_graph)
    nodes, seen, called = [], set(), set()
    waiting = list(names)
    while waiting:
        name = _node_name(waiting.pop())
        if name in graph and name not in seen:
            seen.add(name)
            nodes.append(graph[name])
            waiting += graph[name].input
    for node in nodes:  # grows while we walk along it
        for name in _may_run(node, stand_ins) - called:
            called.add(name)
            nodes += functions[name]
    return nodes, called


def _node_name(tensor):
    """The node of a tensor `node:0` or of a control input `^node`."""
    return tensor.lstrip("^").split(":")[0]


def _called(attributes):
    """The functions that a node's attributes name."""
    for value in attributes.values():
        for function in (value.func, *value.list.func):
            if function.name:
                yield function.name
                yield from _called(function.attr)
